"""Translates with an exported folder in a process in which fairseq cannot be imported.

    python without_fairseq.py FOLDER < JSON > JSON

The input is {"lines": [...], "searches": [options of generate, ...]}; the output has the pieces of
each line, and for each search its translations and, of a beam, their scores.
"""

import json
import sys


class Block:
    """Finds nothing of fairseq, nor of this package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "fairseq_sparsemixer", "omegaconf", "hydra"):
            raise ImportError(f"{name} is not installed")


def main(folder):
    sys.meta_path.insert(0, Block)
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    torch.set_num_threads(1)
    wanted = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(wanted["lines"], return_tensors="pt", padding=True, truncation=True)
    results = []
    for options in wanted["searches"]:
        found = model.generate(
            **inputs, **options, return_dict_in_generate=True, output_scores=True
        )
        scores = getattr(found, "sequences_scores", None)
        text = tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
        results.append({"text": text, "scores": None if scores is None else scores.tolist()})
    pieces = [tokenizer(line).input_ids for line in wanted["lines"]]
    json.dump({"pieces": pieces, "results": results}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
