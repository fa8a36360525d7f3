// Greedy tokens of several GGUF files in llama.cpp: a JSON request as the argument, a JSON line for each file.
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const {packages, files, prompts, tokens, length} = JSON.parse(process.argv[2]);
const entry = createRequire(packages + "/").resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry));
let said = [];
const llama = await getLlama({
    build: "never", gpu: false, maxThreads: 1, logLevel: LlamaLogLevel.error, logger: (_, text) => said.push(text.trim()),
});

async function answer(file) {
    said = [];
    try {
        const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
        const context = await model.createContext({
            contextSize: length, flashAttention: false,
            experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
        });
        const all = [];
        for (const prompt of prompts) {
            const sequence = context.getSequence(), out = [];
            for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
                out.push(token);
                if (out.length === tokens) break;
            }
            all.push(out);
            sequence.dispose();
        }
        await context.dispose();
        await model.dispose();
        return {tokens: all};
    } catch (error) {
        return {error: `${error}: ${said.find((line) => line.includes("error")) ?? ""}`};
    }
}

for (const file of files) console.log(JSON.stringify({file, ...await answer(file)}));
process.exit(0);
