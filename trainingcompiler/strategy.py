"""How several devices share one training: the words of `--strategy`, understood."""

import re
from dataclasses import dataclass

from trainingcompiler.errors import UsageError

CHOICES = "dp, fsdp, tp=K or fsdp+tp=K"
_WORDS = re.compile(r"(?P<data>dp|fsdp)|(?:(?P<also>fsdp)\+)?tp=(?P<tensor>\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """What becomes of the training state on several devices. The batch is divided under each.

    Attributes:
        divides_state: Whether each device holds a part of the state, gathered where it is used (FSDP, Zhao et al. 2023,
            https://arxiv.org/abs/2304.11277), and not all of it.
        tensor_parallel: How many devices share each layer's products (Megatron-LM, Shoeybi et al. 2019,
            https://arxiv.org/abs/1909.08053); 1 is none.
    """

    divides_state: bool = False
    tensor_parallel: int = 1

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """Reads `"dp"`, `"fsdp"`, `"tp=2"` or `"fsdp+tp=2"`.

        Raises:
            UsageError: It is none of these.
        """
        found = _WORDS.fullmatch(text)
        if found is None or found["tensor"] in ("0", "1"):
            raise UsageError(f"--strategy={text}: must be {CHOICES}, K being 2 or more")
        return cls(divides_state="fsdp" in text, tensor_parallel=int(found["tensor"] or 1))

    def check(self, device_count: int) -> None:
        """Refuses a number of devices that the strategy cannot share.

        Raises:
            UsageError: The devices that share each layer do not divide them all.
        """
        if device_count % self.tensor_parallel:
            raise UsageError(
                f"--strategy={self}: groups of {self.tensor_parallel} devices do not divide {device_count}; take a "
                f"multiple of {self.tensor_parallel}"
            )

    def __str__(self) -> str:
        words = ["fsdp"] if self.divides_state else []
        words += [f"tp={self.tensor_parallel}"] if self.tensor_parallel > 1 else []
        return "+".join(words) or "dp"


DP, FSDP = Strategy(), Strategy(divides_state=True)
