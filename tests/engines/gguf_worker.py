"""What a GGUF file holds of experts: `gguf_worker.py FILE`, a JSON line {tensor: [the type, a digest an expert]}."""

import hashlib
import json
import sys

from gguf import GGUFReader

if __name__ == "__main__":
    held = {}
    for tensor in GGUFReader(sys.argv[1]).tensors:
        if "_exps" in tensor.name:
            held[tensor.name] = [tensor.tensor_type.name, *(hashlib.sha256(each).hexdigest() for each in tensor.data)]
    print(json.dumps(held))
