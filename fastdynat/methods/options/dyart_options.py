"""Options of DyART."""

from dataclasses import dataclass

from fastdynat.errors import UserError
from fastdynat.methods.options.method_options import MOST, MethodOptions, check_numbers, check_positive
from fastdynat.units import parse_size


@dataclass(frozen=True, kw_only=True)
class DyartOptions(MethodOptions):
    """Options of DyART; the defaults are the release's for CIFAR-10. `--steps` is the search's number of
    iterations, and it starts half of `--eps` away from the image.
    """

    margin_weight: float = 1000.0
    """Weight of the margin's loss beside the cross-entropy (the paper's lambda)."""

    decay: float = 3.0
    """How much more small margins count than large ones, per unit of [0, 1] pixel range (the paper's
    alpha)."""

    r0: float | str = "16/255"
    """Margins from here on are large enough. As the radii: 16/255, 0.063, or 16 (read as 16/255)."""

    temperature: float = 5.0
    """Temperature of the soft margin; a larger one is nearer to the margin."""

    quality_filter: bool = True
    """Use only boundary points that are nearly nearest: shallow, and reached against the gradient."""

    flat_pixel_test: bool = True
    """Of the filter, the release's third test: a pixel that moved less than the farthest has a gradient of at
    most 0.1."""

    def check(self) -> None:
        check_numbers(self, "margin_weight")
        if not 0 < self.decay <= MOST:
            raise UserError(f"decay must be above 0, got {self.decay:g}; DyART takes 3 to 8")
        parse_size(self.r0, "r0")
        check_positive(self, "temperature")
