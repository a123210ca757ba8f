"""How a wrong name or number is refused: in one line, what came, what is allowed, the nearest."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, allowed: Iterable[str]) -> ValueError:
    """`no mixer 'mamba3'; nearest: mamba2; all: attention, ...`."""
    names = sorted(allowed)
    near = get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return ValueError(f"no {kind} {str(name)!r}{hint}; all: {', '.join(names) or 'none'}")


def not_divisible(name: str, value: int, by: str, divisor: int) -> ValueError:
    """`d_model=100 is not divisible by n_heads=8; nearest: 96, 104`."""
    below = value // divisor * divisor if divisor > 0 else 0
    near = [str(n) for n in (below, below + divisor) if n > 0]
    return ValueError(
        f"{name}={value} is not divisible by {by}={divisor}; nearest: {', '.join(near)}"
    )


def check_positive(**values: float) -> None:
    """Refuse the first value that is not above zero, by its name."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} is not allowed; it must be above 0")


def check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], letters: str) -> None:
    """Refuse a tensor of another shape: `initial_state is (2, 3); (B, D) here is (2, 4)`."""
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name} is {tuple(shape)}; {letters} here is {tuple(wanted)}")
