"""Log-likelihoods of continuations, as lm-eval asks for them, without computing logits that nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor, nn

from thanos.checkpoint import max_length
from thanos.walk.replay import run_model

_TOKENS = {"cpu": 2048, "cuda": 16384}  # of a batch, padding included
_LOGITS = 1 << 26  # computed in a batch
_ROWS = 512  # of logits turned into log-likelihoods at a time, in float32
_LONGEST = 2048  # tokens of a sequence, for models without a limit

Request = tuple[tuple[str, str], list[int], list[int]]


class Scorer(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of a loaded causal language model, ordinary or compact.

    Sequences are padded on the right, which causal models do not see, and sorted by length, so that they hardly are;
    equal sequences (such as a question with the one-token answers "yes" and "no") run once.

    Args:
        model: a Hugging Face causal language model in evaluation mode, on the device to use.
        tokenizer: its tokenizer.
        batch_size: sequences run together; None takes as many as a budget of tokens and of logits allows, and half of
            them, again and again, where a GPU's memory does not hold them.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int | None = None) -> None:
        super().__init__()
        config: Any = model.config
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.progress: Callable[[int, int], None] | None = None
        self._longest = max_length(config) or _LONGEST
        self._device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self._tokens = _TOKENS.get(self._device.type, _TOKENS["cuda"])
        self._logits = _LOGITS // config.get_text_config().vocab_size

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a continuation without a context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("only multiple-choice tasks are scored")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("only multiple-choice tasks are scored")

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        """For each request, the summed log-likelihood of its continuation, and whether greedy decoding gives it."""
        answers = [(0.0, True)] * len(requests)
        wanted: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}  # sequence to requests, the tokens they end in
        for index, (_, context, continuation) in enumerate(requests):
            tokens = (context + continuation)[-(self._longest + 1) :]
            if targets := tokens[1:][-len(continuation) :] if continuation else []:
                wanted.setdefault(tuple(tokens[:-1]), []).append((index, _tokens(targets)))
        done = len(requests) - sum(map(len, wanted.values()))
        sequences = sorted(wanted, key=lambda sequence: (-len(sequence), sequence))
        reach = {sequence: max(len(targets) for _, targets in asked) for sequence, asked in wanted.items()}
        start = 0
        while start < len(sequences):
            batch = sequences[start : start + self._fitting(sequences, start, reach)]
            asked = [(row, index, targets) for row, sequence in enumerate(batch) for index, targets in wanted[sequence]]
            try:
                scored = self._score(batch, [(row, targets) for row, _, targets in asked])
            except torch.OutOfMemoryError:
                if len(batch) == 1 or self.batch_size is not None:
                    raise
                self._tokens, self._logits = self._tokens // 2, self._logits // 2
                torch.cuda.empty_cache()
                continue
            for (_, index, _), answer in zip(asked, scored, strict=True):
                answers[index] = answer
            start += len(batch)
            done += len(asked)
            if self.progress is not None:
                self.progress(done, len(requests))
        return answers

    def _fitting(self, sequences: list[tuple[int, ...]], start: int, reach: dict[tuple[int, ...], int]) -> int:
        """How many sequences from ``start`` on run together; at least one."""
        if self.batch_size is not None:
            return self.batch_size
        longest, kept = len(sequences[start]), 0
        for count in range(1, len(sequences) - start + 1):
            sequence = sequences[start + count - 1]
            kept = max(kept, longest - len(sequence) + reach[sequence])
            if count > 1 and (count * longest > self._tokens or count * kept > self._logits):
                return count - 1
        return len(sequences) - start

    def _score(self, batch: list[tuple[int, ...]], asked: list[tuple[int, Tensor]]) -> list[tuple[float, bool]]:
        """Run sequences, the longest first; for each (row, targets), the answer where that row should end in them."""
        longest = len(batch[0])
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64, device="cpu")
        for row, sequence in enumerate(batch):
            tokens[row, : len(sequence)] = _tokens(sequence)
        firsts = [len(batch[row]) - len(targets) for row, targets in asked]
        with torch.inference_mode():
            logits = run_model(self.model, tokens, last=longest - min(firsts)).logits
            shift = longest - logits.shape[1]  # a model may compute the logits of all positions all the same
            starts = [row * logits.shape[1] + first - shift for (row, _), first in zip(asked, firsts, strict=True)]
            places = torch.cat(
                [
                    torch.arange(start, start + len(targets), dtype=torch.int64, device="cpu")
                    for (_, targets), start in zip(asked, starts, strict=True)
                ]
            )
            targets = torch.cat([targets for _, targets in asked])
            likely, greedy = _of_targets(logits.flatten(0, 1), places.to(logits.device), targets.to(logits.device))
        lengths = [len(targets) for _, targets in asked]
        return [
            (float(part.sum()), bool(hits.all()))
            for part, hits in zip(likely.split(lengths), greedy.split(lengths), strict=True)
        ]


def _tokens(ids: Sequence[int]) -> Tensor:
    """On the CPU, whatever the default device is."""
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _of_targets(logits: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """From the rows ``places`` (P,) of logits (N, V): log-likelihoods of ``targets`` (P,), and whether each is best."""
    likely, greedy = [], []
    for rows, wanted in zip(places.split(_ROWS), targets.split(_ROWS), strict=True):
        chosen = logits[rows].float()
        likely.append(chosen.gather(1, wanted[:, None])[:, 0] - chosen.logsumexp(1))
        greedy.append(chosen.argmax(1) == wanted)
    return torch.cat(likely).cpu(), torch.cat(greedy).cpu()
