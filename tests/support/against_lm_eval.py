"""The time of an evaluation beside lm-evaluation-harness's `loglikelihood_rolling`, on the same tokens in the same windows.

`python -m tests.support.against_lm_eval` prints a ratio per pair of runs, ours over theirs, and both sums of losses, which have to agree.
The model is a GPT-2 of 6 layers, 768 wide, with 50,257 words, untrained and swapped to `alibi`; the text has 8,192 of them.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import pe_swap
from pe_swap.evaluation.evaluator import Evaluator
from pe_swap.runs.config import MeasureSection

WORDS, TOKENS, WINDOW, PAIRS = 50257, 8192, 2048, 5


def main() -> None:
    """Time both, in turn."""
    torch.manual_seed(0)
    inner = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w0", eos_token="w0", pad_token="w0")
    model: Any = pe_swap.swap_positional(GPT2LMHeadModel(GPT2Config(n_layer=6, bos_token_id=0, eos_token_id=0)).eval(), "alibi")
    ids = torch.randint(1, WORDS, (TOKENS,)).tolist()
    ours = Evaluator([ids], tokenizer, MeasureSection(lengths=[WINDOW], protocols=["nonoverlapping"], batch_tokens=2 * WINDOW))
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=WINDOW, device="cpu")
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(" ".join(f"w{index}" for index in ids),), idx=0)
    ratios = []
    for pair in range(PAIRS + 1):
        start = time.perf_counter()
        row = ours.measured(model, "nonoverlapping", WINDOW)
        middle = time.perf_counter()
        (total,) = theirs.loglikelihood_rolling([request], disable_tqdm=True)
        end = time.perf_counter()
        if pair:  # the first warms both up
            ratios.append((middle - start) / (end - middle))
    print(f"losses: ours {sum(row['document_losses'][0]):.3f}, theirs {-total:.3f} nats of {TOKENS:,} tokens")
    print(f"time, ours over theirs: {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))})")


if __name__ == "__main__":
    main()
