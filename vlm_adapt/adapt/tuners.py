"""peft's tuners of linear layers by name, one tiny class each: what it is, its paper, settings that fit.

Knows literals only. A tuner of a later peft is one class here and one line in the table.
"""

from __future__ import annotations

from vlm_adapt.adapt.tuner import Tuner


class LoHa(Tuner):
    """Hadamard product of two low-rank products."""

    name = "loha"
    kind = "LOHA"
    summary = "W + (B1 A1) * (B2 A2): Hadamard product of two low-rank products"
    paper = "Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098"
    layers = ("linear", "conv")
    example = {"r": 4}


class LoKr(Tuner):
    """Kronecker product; with a rank that no factor reaches, the full one of KronA."""

    name = "lokr"
    kind = "LOKR"
    summary = "W + A kron B; KronA with r larger than every factor"
    paper = "Edalati et al. 2022 (KronA), arXiv 2212.10650; Yeh et al. 2023, arXiv 2309.14859"
    layers = ("linear", "conv")
    example = {"r": 64, "alpha": 64}


class Oft(Tuner):
    """Block-diagonal rotation of the input."""

    name = "oft"
    kind = "OFT"
    summary = "W R with R block-diagonal and orthogonal (Cayley)"
    paper = "Qiu et al. 2023, arXiv 2306.07280"
    additive = False
    example = {"oft_block_size": 4}


class Boft(Tuner):
    """Butterfly-factored rotation."""

    name = "boft"
    kind = "BOFT"
    summary = "W R with R a product of sparse orthogonal butterfly factors"
    paper = "Liu et al. 2023, arXiv 2311.06243"
    layers = ("linear", "conv")
    additive = False
    nests = False
    example = {"boft_block_size": 4}


class Hra(Tuner):
    """Chain of Householder reflections."""

    name = "hra"
    kind = "HRA"
    summary = "W times a chain of r Householder reflections"
    paper = "Yuan et al. 2024, arXiv 2405.17484"
    layers = ("linear", "conv")
    additive = False
    nests = False
    example = {"r": 4}


class Road(Tuner):
    """Rotation and scaling of pairs of outputs."""

    name = "road"
    kind = "ROAD"
    summary = "2D rotations and scales of pairs of outputs"
    paper = "Liao and Monz 2024, arXiv 2409.00119"
    additive = False
    example = {"group_size": 16}


class Vera(Tuner):
    """Shared random projections, two trained vectors a layer."""

    name = "vera"
    kind = "VERA"
    summary = "random A and B shared by all layers; two vectors a layer train"
    paper = "Kopiczko et al. 2023, arXiv 2310.11454"
    shares = True
    nests = False
    example = {"r": 8}


class Pvera(Tuner):
    """VeRA with a learned variance, sampled while training."""

    name = "pvera"
    kind = "PVERA"
    summary = "VeRA whose scales are sampled while training, with a learned variance"
    paper = "2025 (PVeRA), arXiv 2512.07703"
    shares = True
    nests = False
    example = {"r": 8}


class RandLora(Tuner):
    """Full-rank sum of scaled random low-rank bases."""

    name = "randlora"
    kind = "RANDLORA"
    summary = "full-rank update: trained scales of shared random low-rank bases"
    paper = "Albert et al. 2025, arXiv 2502.00987"
    shares = True
    nests = False
    example = {"r": 4}


class VbLora(Tuner):
    """Low-rank factors composed of a shared bank of vectors."""

    name = "vblora"
    kind = "VBLORA"
    summary = "A and B composed of the top-k of one bank of vectors, shared by all layers"
    paper = "Li et al. 2024, arXiv 2405.15179"
    identity = False
    shares = True
    example = {"num_vectors": 8, "vector_length": 16, "r": 2}


class UniLora(Tuner):
    """All low-rank factors projected from one vector."""

    name = "unilora"
    kind = "UNILORA"
    summary = "all A and B read off one trained vector at fixed random places"
    paper = "2025 (Uni-LoRA), arXiv 2506.00799"
    identity = False
    shares = True
    example = {"r": 2, "theta_d_length": 64}


class TinyLora(Tuner):
    """A handful of numbers in the layer's own singular directions."""

    name = "tinylora"
    kind = "TINYLORA"
    summary = "a vector of u numbers a layer, in the layer's own top singular directions"
    paper = "2026 (TinyLoRA), arXiv 2602.04118"
    shares = True
    nests = False
    example = {"u": 8}


class FourierFt(Tuner):
    """Sparse spectrum of the update."""

    name = "fourierft"
    kind = "FOURIERFT"
    summary = "the update is the inverse Fourier transform of n trained coefficients"
    paper = "Gao et al. 2024, arXiv 2405.03003"
    identity = False
    example = {"n_frequency": 20}


class WaveFt(Tuner):
    """Sparse wavelet coefficients of the update."""

    name = "waveft"
    kind = "WAVEFT"
    summary = "the update is the inverse wavelet transform of n trained coefficients"
    paper = "Bilican et al. 2025, arXiv 2505.12532"
    example = {"n_frequency": 20}


class C3a(Tuner):
    """Block-circular convolution."""

    name = "c3a"
    kind = "C3A"
    summary = "the update is a block-circular convolution"
    paper = "Chen et al. 2024, arXiv 2407.19342"
    identity = False
    stacks = False
    example = {"block_size": 16}


class Shira(Tuner):
    """Sparse high-rank entries of the weight."""

    name = "shira"
    kind = "SHIRA"
    summary = "a few scattered entries of the weight itself, as many as LoRA of rank r has"
    paper = "Bhardwaj et al. 2024, arXiv 2406.13175"
    nests = False
    reads_values = True
    example = {"r": 2}


class SuperTuning(Tuner):
    """The weight's largest entries."""

    name = "supertuning"
    kind = "SUPERTUNING"
    summary = "the largest (or smallest) entries of the weight, with LoRA beside them if r is given"
    paper = "2026 (Super-Tuning), arXiv 2607.09287"
    nests = False
    example = {"sparsity": 0.9}
