"""Write rmtkern/spectrum/tracy_widom.npz: the Tracy-Widom law for real matrices on a grid (needs SciPy).

F1(s) = det(I - B_s) on L2(0, inf) with B_s(x, y) = Ai(x + y + s) (Ferrari & Spohn 2005), by Gauss-Legendre quadrature
as in Bornemann (2010). Stored as Phi^-1(F1(s)), which is smooth enough for linear interpolation on a 0.02 grid.
"""

from pathlib import Path

import numpy as np
from scipy.special import airy, ndtri

S = np.round(np.arange(-8.0, 9.001, 0.02), 10)


def cdf(s: float, order: int = 80, reach: float = 16.0) -> float:
    """F1(s); the quadrature converges exponentially in `order`."""
    node, weight = np.polynomial.legendre.leggauss(order)
    upper = max(reach - s, 6.0) / 2
    x, w = (node + 1) * upper / 2, np.sqrt(weight * upper / 2)
    return float(np.linalg.det(np.eye(order) - w[:, None] * airy(x[:, None] + x[None, :] + s)[0] * w[None, :]))


if __name__ == "__main__":
    out = Path(__file__).resolve().parents[1] / "rmtkern" / "spectrum" / "tracy_widom.npz"
    np.savez_compressed(out, s=S, probit=ndtri(np.array([cdf(s) for s in S])))
