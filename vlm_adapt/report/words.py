"""Numbers as a reader wants them: 1.2 M, 3 min 5 s, 91.4 %. Knows nothing about runs."""

from __future__ import annotations

import math


def number(value: float, digits: int = 3) -> str:
    """`12345678` -> `"12.3 M"`, `0.000123` -> `"1.23e-4"`; whole numbers below 10,000 stay as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    size = abs(value)
    if float(value).is_integer() and size < 10_000:
        return str(int(value))
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    for least, divisor, unit in ((1e12, 1e12, " T"), (1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if size >= least:
            value, size = value / divisor, size / divisor
            return (f"{value:.0f}" if size >= 100 else f"{value:.{digits}g}") + unit
    return f"{value:.0f}" if size >= 1000 else f"{value:.{digits}g}"


def count(value: int) -> str:
    """`134515008` -> `"134,515,008"`."""
    return f"{value:,}"


def duration(seconds: float) -> str:
    """`7385` -> `"2 h 3 min"`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def share(value: float) -> str:
    """`0.914` -> `"91.4 %"`."""
    return f"{100 * value:.1f} %"
