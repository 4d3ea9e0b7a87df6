"""vLLM's side of benchmarks.beside_vllm: it runs in the environment of vLLM, and imports no tempo.

Each line on the input asks for one round. The answer is a line of JSON: seconds and tokens.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Load the model, then make a round for each line."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    folder, num_steps = Path(sys.argv[1]), int(sys.argv[2])
    prompts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    limits = {"max_model_len": 512, "max_num_seqs": len(prompts)}
    plain = {"enforce_eager": True, "enable_prefix_caching": False}
    engine = LLM(model=str(folder), dtype="float32", **limits, **plain)
    settings = SamplingParams(temperature=0, max_tokens=num_steps, ignore_eos=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        found = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False
        )
        seconds = time.perf_counter() - began
        tokens = [list(each.outputs[0].token_ids) for each in found]
        print("ROUND " + json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
