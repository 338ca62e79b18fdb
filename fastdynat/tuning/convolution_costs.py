"""A cost model of 3x3 convolutions on a CPU, direct and by Winograd's algorithm, fitted to measurements.

A cost is that of a forward pass and its input gradient together, in multiply-adds of a direct convolution.
The constants were fitted to timings on one AVX-512 core (AMD EPYC, oneDNN of torch 2.11) and to the same
limited to AVX2: 32 to 640 channels, maps of 2x2 to 56x56, batches of 1 to 128, both memory formats. No clock
is read, so a run that is resumed decides as it did before.
"""

from dataclasses import dataclass

TILE, POINTS = 4, 36  # of F(4x4, 3x3): 6x6 points are multiplied for 4x4 outputs
# Tiles are processed in parts that fit the second-level cache (csrc/winograd.cpp); each reads all weights.
# Parts have at least so many tiles, twice as many where the weights are larger than NEAR_BYTES.
PART_BYTES, PART_TILES, NEAR_BYTES = 3 << 18, 42, 4 << 20
# Winograd's algorithm rounds more coarsely, so that the direct convolution wins a draw.
MARGIN = 0.03


@dataclass(frozen=True)
class Costs:
    """Costs of other work, in multiply-adds of a direct convolution.

    Attributes:
        point: a multiply-add of Winograd's matrix products.
        moved: a value of a tile on its way into the transformed domain or out of it.
        converted: a value that is copied to channels-last memory or back.
        read: a weight in the transformed domain, read once; `read_direct` as many of a direct convolution.
        transformed: a weight transformed, for both passes.
        call: of the operators, autograd's work included; `call_direct` of the direct ones.
    """

    point: float = 1.15
    moved: float = 27.0
    converted: float = 55.0
    read: float = 18.0
    read_direct: float = 11.0
    transformed: float = 100.0
    call: float = 11e6
    call_direct: float = 1e6

    @classmethod
    def with_vectors(cls, bits: int) -> "Costs":
        """On a processor with vectors of so many bits: with 256, moving values takes longer."""
        return cls() if bits >= 512 else cls(moved=44.0)


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution of `images` maps with stride and padding 1; `channels_last`: the memory format of its
    input.
    """

    images: int
    channels_in: int
    channels_out: int
    height: int
    width: int
    channels_last: bool

    @property
    def filters(self) -> int:
        return self.channels_in * self.channels_out

    def direct(self, costs: Costs) -> float:
        """The cost of the direct convolution, without products with the padding."""
        taps = (3 * self.height - 2) * (3 * self.width - 2)
        return (
            2.0 * self.images * taps * self.filters
            + 2 * POINTS * self.filters * costs.read_direct
            + costs.call_direct
        )

    def winograd(self, costs: Costs) -> float:
        """The cost by Winograd's algorithm, with transformed weights."""
        channels = self.channels_in + self.channels_out
        tiles = self.images * -(-self.height // TILE) * -(-self.width // TILE)
        fewest = PART_TILES if 4 * POINTS * self.filters <= NEAR_BYTES else 2 * PART_TILES
        parts = -(-tiles // max(fewest, PART_BYTES // (4 * POINTS * channels)))
        cost = 2.0 * POINTS * tiles * (self.filters * costs.point + channels * costs.moved)
        cost += 2 * POINTS * self.filters * costs.read * parts + costs.call
        if not self.channels_last:
            cost += 2 * self.images * self.height * self.width * channels * costs.converted
        return cost

    def gain(self, costs: Costs) -> float:
        """The cost that Winograd's algorithm saves; 0 if that is within `MARGIN`."""
        direct = self.direct(costs)
        saved = direct - self.winograd(costs)
        return saved if saved > MARGIN * direct else 0.0

    def repays(self, costs: Costs, passes: float) -> bool:
        """True if `passes` pairs of passes save more than transforming the weights costs."""
        return self.gain(costs) * passes > 2 * POINTS * self.filters * costs.transformed
