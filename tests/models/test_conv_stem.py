"""Networks with convolutional stems: shapes, refusals, and equality with RobustBench's networks."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from support.robustbench_classes import robustbench_module
from torch import nn

from fastdynat.errors import UserError
from fastdynat.models import build_model
from fastdynat.models.conv_stem import ChannelNorm, IsotropicBlock, conv_stem_names
from fastdynat.models.initial_state import put_initial_state

pytestmark = needs("timm")
PUBLISHED = {  # millions of parameters with 1000 classes, from the table of Singh et al. 2023
    "convnext-t-cvst": 28.6,
    "convnext-s-cvst": 50.3,
    "convnext-b-cvst": 88.8,
    "vit-s-cvst": 22.8,
    "vit-b-cvst": 87.1,
}


@pytest.mark.parametrize("name", conv_stem_names())
def test_all_build_for_classes_channels_and_size(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=7, image_shape=(1, 64, 32))
        assert model(torch.empty(2, 1, 64, 32)).shape == (2, 7)
        assert build_model(name.replace("-", "_").upper(), num_classes=7, image_shape=(3, 32, 32))
    assert not any("model." in key or "module." in key for key in model.state_dict())


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_parameters_are_the_published_ones(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes=1000, image_shape=(3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_channel_norm_is_a_layer_norm_over_channels() -> None:
    layer = ChannelNorm(6).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    expected = expected * layer.weight.view(6, 1, 1) + layer.bias.view(6, 1, 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_isotropic_block_is_timms_block_without_layer_scale() -> None:
    from timm.models.convnext import ConvNeXtBlock

    torch.manual_seed(0)
    ours, theirs = IsotropicBlock(8).double(), ConvNeXtBlock(8, ls_init_value=None).double()
    names = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    for mine, other in names.items():
        theirs.get_submodule(other).load_state_dict(ours.get_submodule(mine).state_dict())
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_unknown_names_and_sizes() -> None:
    with pytest.raises(UserError, match="did you mean 'convnext-t-cvst'"):
        build_model("convnext-tt-cvst", num_classes=10, image_shape=(3, 32, 32))
    with pytest.raises(UserError, match="multiples of 16 pixels, these are 28x28"):
        build_model("vit-s-cvst", num_classes=10, image_shape=(1, 28, 28))
    with pytest.raises(UserError, match="convnext-t-cvst"):
        build_model("nonsense", num_classes=10, image_shape=(3, 32, 32))


def test_another_image_size_is_said() -> None:
    ours, other = (build_model("vit-ti-cvst", num_classes=4, image_shape=(3, s, s)) for s in (32, 64))
    with pytest.raises(UserError, match=r"net.pos_embed is \(1, 17, 192\) there, .* with --image-size"):
        put_initial_state(ours, other.state_dict(), "w", num_classes=4)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Callable[..., nn.Module]]:
    """`get_convstem_models` of RobustBench."""
    with robustbench_module("convstem_models") as module:
        yield module.get_convstem_models


@needs("robustbench")
@pytest.mark.parametrize("name", ["convnext-t", "convnext-s", "convnext-b", "convnext-l", "vit-s", "vit-b"])
def test_robustbenchs_networks_have_our_keys_and_shapes(name: str, theirs: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        ours = build_model(f"{name}-cvst", num_classes=1000, image_shape=(3, 224, 224))
        found = theirs(f"{name.replace('-', '_')}_cvst").state_dict()
    keys = {key.removeprefix("model."): tuple(v.shape) for key, v in found.items() if "normalize" not in key}
    wanted = {k.removeprefix("net."): tuple(v.shape) for k, v in ours.state_dict().items()}
    assert keys == {key: shape for key, shape in wanted.items() if "normalize" not in key}


@needs("robustbench")
@pytest.mark.parametrize(("name", "size"), [("convnext-t", 64), ("vit-s", 224)])
@torch.no_grad()
def test_robustbenchs_networks_have_our_logits(
    name: str, size: int, theirs: Callable[..., nn.Module]
) -> None:
    """1e-5 in float32 and 1e-10 in float64; the ViT brings ImageNet's mean and standard deviation."""
    torch.manual_seed(1)
    other = theirs(f"{name.replace('-', '_')}_cvst").double().eval()
    for parameter in other.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = build_model(f"{name}-cvst", num_classes=1000, image_shape=(3, size, size))
    x = torch.rand(1, 3, size, size, dtype=torch.float64)
    expected = other(x)
    put_initial_state(ours, other.state_dict(), "w", num_classes=1000)
    single = ours.eval()(x.float())
    put_initial_state(ours.double(), other.state_dict(), "w", num_classes=1000)
    scale = expected.abs().max()
    assert (single - expected).abs().max() < 1e-5 * scale
    # The buffers of the normalisation are float32 constants in both.
    assert (ours(x) - expected).abs().max() < (1e-7 if name == "vit-s" else 1e-10) * scale
    assert F.cosine_similarity(single.double(), expected) > 0.9999
