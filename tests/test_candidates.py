"""Positions in networks written by hand, one for each way in which a stage hides from a search for cuts.

Axes: N images, C channels, H and W positions, T tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.candidates import candidates
from matchdistill.encoder import encoders
from matchdistill.trace import traced
from networks import Function, conv_bn

IMAGES = torch.zeros(2, 3, 32, 32)


def found(network: nn.Module, *example: Any) -> list[list[str]]:
    """The preferred taps of each encoder."""
    return [
        [str(stage[-1].tap) for stage in stages]
        for encoder in encoders(traced(network, example or (IMAGES,)))
        if (stages := candidates(encoder))
    ]


class Bottleneck(nn.Module):
    """A linear bottleneck: no activation at its end, a sum where it keeps the size."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.expand, self.act = conv_bn(channels_in, 2 * channels, stride), nn.ReLU()
        self.project, self.adds = conv_bn(2 * channels, channels, 1, 1), channels_in == channels and stride == 1

    def forward(self, values: Tensor) -> Tensor:
        made = self.project(self.act(self.expand(values)))
        return values + made if self.adds else made


class Residual(nn.Module):
    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(width), inner

    def forward(self, values: Tensor) -> Tensor:
        return values + self.inner(self.norm(values))


def pyramid(width: int = 4) -> nn.Sequential:
    """Stages that begin with an activation and end in sums."""
    return nn.Sequential(
        *(
            nn.Sequential(Bottleneck(channels, 2 * channels, 2), Bottleneck(2 * channels, 2 * channels))
            for channels in (3, 6, 12)
        )
    )


def test_sums_after_the_last_activation_of_a_stage() -> None:
    assert found(pyramid()) == [["0.1:output", "1.1:output", "2.1:output"]]


def test_a_stage_of_one_block_without_a_sum() -> None:
    network = nn.Sequential(Bottleneck(3, 8, 2), Bottleneck(8, 16, 2))
    assert found(network) == [["0:output", "1:output"]]


def test_a_norm_at_the_end_of_a_stage_belongs_to_it() -> None:
    network = nn.Sequential(
        *(nn.Sequential(stage, nn.BatchNorm2d(c)) for stage, c in zip(pyramid(), (6, 12, 24), strict=True))
    )
    assert found(network) == [["0:output", "1:output", "2:output"]]


def test_every_stage_is_used_again_by_a_decoder() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        kept = []
        for stage in self.encoder:
            x = stage(x)
            kept.append(x)
        for block, skip in zip(self.decoder, kept[-2::-1], strict=True):
            x = F.relu(block(torch.cat([F.interpolate(x, skip.shape[2:]), skip], 1)))
        return self.head(x)

    decoder = nn.ModuleList([conv_bn(24 + 12, 12), conv_bn(12 + 6, 6)])
    network = Function(forward, encoder=pyramid(), decoder=decoder, head=nn.Conv2d(6, 2, 1))
    assert found(network) == [["encoder.0.1:output", "encoder.1.1:output", "encoder.2.1:output"]]


def test_a_head_of_convolutions_behind_the_encoder_is_left_out() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.backbone(x)), x.shape[2:])

    head = nn.Sequential(conv_bn(24, 8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    network = Function(forward, backbone=pyramid(), head=head)
    assert found(network) == [["backbone.0.1:output", "backbone.1.1:output", "backbone.2.1:output"]]


def test_further_levels_of_a_pyramid_are_no_stages() -> None:
    def forward(self: Any, x: Tensor) -> list[Tensor]:
        c5 = self.body(x)
        p6 = self.p6(c5)
        return [c5, p6, self.p7(F.relu(p6))]

    levels = {f"p{number}": nn.Conv2d(24, 24, 3, 2, 1) for number in (6, 7)}
    network = Function(forward, body=pyramid(), **levels)
    assert found(network, torch.zeros(2, 3, 64, 64)) == [["body.0.1:output", "body.1.1:output", "body.2.1:output"]]


def test_work_at_a_lower_resolution_within_a_block_is_no_stage() -> None:
    def dip(self: Any, x: Tensor) -> Tensor:
        return x * F.interpolate(self.gate(F.avg_pool2d(x, 2)), x.shape[2:]).sigmoid()

    body = nn.Sequential(*pyramid(), Residual(24, Function(dip, gate=conv_bn(24, 24))))
    assert found(body) == [["0.1:output", "1.1:output", "3:output"]]


def test_branches_of_several_resolutions() -> None:
    """Nothing flows through a single value of the second and third resolution: the last sums at each are taken."""

    def forward(self: Any, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.down(fine)
        for act, up, down in zip(self.acts, self.ups, self.downs, strict=True):
            fine = act(fine + F.interpolate(up(coarse), fine.shape[2:]))
            coarse = F.relu(coarse + down(fine))
        return F.relu(self.last(fine) + self.wide(coarse))

    network = Function(
        forward,
        stem=conv_bn(3, 8, 2),
        down=conv_bn(8, 8, 2),
        acts=nn.ModuleList(nn.ReLU() for _ in range(3)),
        ups=nn.ModuleList(conv_bn(8, 8, 1, 1) for _ in range(3)),
        downs=nn.ModuleList(conv_bn(8, 8, 2) for _ in range(3)),
        last=conv_bn(8, 32, 2),
        wide=conv_bn(8, 32),
    )
    assert found(network) == [["acts.2:input", "last.1:output + wide.1:output"]]


def test_other_inputs_constants_and_masks_do_not_count() -> None:
    def forward(self: Any, x: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.mask(torch.ones(2, 4))
        return torch.cat([self.net(x).mean((2, 3)) * mask, self.table(kind)], 1), mask

    mask = Function(lambda self, x: x.cumsum(1)[:, -1:])
    network = Function(forward, net=pyramid(), table=nn.Embedding(5, 2), mask=mask)
    assert found(network, IMAGES, torch.zeros(2, dtype=torch.int64)) == [
        ["net.0.1:output", "net.1.1:output", "net.2.1:output"]
    ]


def test_two_images_have_an_encoder_each() -> None:
    def forward(self: Any, colour: Tensor, depth: Tensor) -> Tensor:
        return torch.cat([self.colour(colour).mean((2, 3)), self.depth(depth).mean((2, 3))], 1)

    network = Function(forward, colour=pyramid(), depth=pyramid())
    expected = [[f"{name}.{stage}.1:output" for stage in range(3)] for name in ("colour", "depth")]
    assert found(network, IMAGES, IMAGES) == expected


def test_a_pair_of_images_for_one_network_has_the_taps_of_its_last_call() -> None:
    network = Function(lambda self, x, y: self.net(x).mean((2, 3)) - self.net(y).mean((2, 3)), net=pyramid())
    assert found(network, IMAGES, IMAGES) == [["net.0.1:output", "net.1.1:output", "net.2.1:output"]]


def test_a_list_of_images_is_a_batch() -> None:
    network = Function(lambda self, images: self.net(torch.stack(images)), net=pyramid())
    images = [torch.zeros(3, 32, 32) for _ in range(4)]
    assert found(network, images) == [["net.0.1:output", "net.1.1:output", "net.2.1:output"]]


class Tokens(nn.Module):
    """Attention over tokens, with queries of its own where it decodes."""

    def __init__(self, width: int, decodes: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.queries = nn.Parameter(torch.zeros(1, 5, width)) if decodes else None
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        queries = tokens if self.queries is None else self.queries.expand(len(tokens), -1, -1)
        values = queries + self.attention(queries, tokens, tokens, need_weights=False)[0]
        return values + self.mlp(values)


def test_a_convolutional_stem_before_tokens_has_no_position_and_queries_are_none() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.decoder(tokens))

    network = Function(
        forward,
        stem=nn.Sequential(conv_bn(3, 4, 2), nn.ReLU(), conv_bn(4, 16, 2)),
        blocks=nn.ModuleList(Tokens(16) for _ in range(4)),
        decoder=Tokens(16, decodes=True),
        head=nn.Linear(16, 2),
    )
    (encoder,) = encoders(traced(network, (IMAGES,)))
    (blocks,) = candidates(encoder)
    assert [str(one.tap) for one in blocks] == [f"blocks.{number}:output" for number in range(4)]
    assert blocks[0].operation.grid == (8, 8)


def test_a_coarser_map_of_a_neck_behind_a_transformer_is_no_stage() -> None:
    def encode(self: Any, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens)
        return tokens

    def forward(self: Any, x: Tensor) -> Tensor:
        maps = self.backbone(x).mT.unflatten(2, (8, 8))
        coarse = self.coarse(maps)
        coarse = coarse + self.block(coarse)
        return self.head(self.fine(maps) + F.interpolate(coarse, maps.shape[2:]))

    blocks = nn.ModuleList(Tokens(16) for _ in range(6))
    network = Function(
        forward,
        backbone=Function(encode, patches=nn.Conv2d(3, 16, 4, 4), blocks=blocks),
        coarse=nn.Conv2d(16, 16, 3, 2, 1),
        block=nn.Conv2d(16, 16, 3, 1, 1),
        fine=nn.Conv2d(16, 16, 1),
        head=nn.Conv2d(16, 2, 1),
    )
    (stages,) = (candidates(encoder) for encoder in encoders(traced(network, (IMAGES,))))
    assert [[str(one.tap) for one in stage] for stage in stages] == [
        [f"backbone.blocks.{number}:output" for number in range(6)]
    ]


def test_blocks_that_end_in_a_norm_are_tapped_behind_it() -> None:
    def block(self: Any, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens + self.drop(self.mix(tokens)))
        return self.last(tokens + self.drop2(self.mlp(tokens)))

    def made() -> nn.Module:
        mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        norms = {"norm": nn.LayerNorm(8), "last": nn.LayerNorm(8)}
        return Function(block, mix=nn.Linear(8, 8), mlp=mlp, drop=nn.Dropout(), drop2=nn.Dropout(), **norms)

    network = Function(
        lambda self, x: self.blocks(self.patches(x).flatten(2).mT),
        patches=nn.Conv2d(3, 8, 4, 4),
        blocks=nn.Sequential(*(made() for _ in range(3))),
    )
    (stages,) = (candidates(encoder) for encoder in encoders(traced(network, (IMAGES,))))
    assert [[str(one.tap) for one in stage] for stage in stages] == [
        [f"blocks.{number}.{name}:output" for number in range(3) for name in ("norm", "last")]
    ]


def test_a_sum_is_of_what_the_network_adds_in_training_mode_too() -> None:
    network = Function(
        lambda self, x: F.relu(self.shortcut(x) + self.drop(self.conv(x))),
        shortcut=nn.Conv2d(3, 4, 1, 2),
        conv=nn.Conv2d(3, 4, 3, 2, 1),
        drop=nn.Dropout2d(),
    )
    assert found(network) == [["shortcut:output + drop:output"]]


def test_before_an_activation_that_many_blocks_share_the_tap_is_of_the_block() -> None:
    """A hook on the activation would stay on other blocks, and on other networks that have the same module."""
    act = nn.ReLU()
    network = nn.Sequential(conv_bn(3, 4, 2), act, conv_bn(4, 4, 2), act)
    assert found(network) == [["0.1:output", "2.1:output"]]


def test_norms_around_blocks_that_end_in_sums_end_no_block() -> None:
    """Of tokens with positions before the blocks (CLIP), and of tokens joined to a class token behind them (CaiT)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = self.before(self.patches(x).flatten(2).mT + self.positions.weight)
        tokens = self.blocks(tokens)
        return self.head(self.norm(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))[:, 0])

    network = Function(
        forward,
        patches=nn.Conv2d(3, 16, 4, 4),
        positions=nn.Embedding(64, 16),
        before=nn.LayerNorm(16),
        blocks=nn.Sequential(*(Tokens(16) for _ in range(3))),
        norm=nn.LayerNorm(16),
        head=nn.Linear(16, 2),
    )
    (stages,) = (candidates(encoder) for encoder in encoders(traced(network, (IMAGES,))))
    assert [[str(one.tap) for one in stage] for stage in stages] == [[f"blocks.{number}:output" for number in range(3)]]


def test_a_norm_at_the_start_of_a_stage_is_not_the_end_of_the_one_before() -> None:
    """The first block of a stage without an identity begins with a norm that everything flows through (Hiera)."""

    def block(self: Any, tokens: Tensor) -> Tensor:
        values = self.norm(tokens)
        values = self.proj(values) + self.mix(values) if self.reduces else tokens + self.mix(values)
        return values.unflatten(1, (-1, 4)).amax(2) if self.reduces else values

    def made(reduces: bool) -> nn.Module:
        parts = {"norm": nn.LayerNorm(8), "proj": nn.Linear(8, 8), "mix": nn.Linear(8, 8)}
        network = Function(block, **parts)
        network.reduces = reduces  # type: ignore[assignment]
        return network

    def forward(self: Any, x: Tensor) -> Tensor:
        units = self.patches(x).unflatten(3, (4, 2)).unflatten(2, (4, 2))  # 2 x 2 tokens of a unit lie together
        return self.blocks(units.permute(0, 2, 4, 3, 5, 1).flatten(1, 4))

    blocks = nn.Sequential(made(False), made(False), made(True), made(False))
    network = Function(forward, patches=nn.Conv2d(3, 8, 4, 4), blocks=blocks)
    assert found(network) == [["blocks.1:output", "blocks.3:output"]]
