"""SAM's mask decoder over packed prompts: the package's weights, half its operations.

``MaskDecoder.forward`` of ``segment-anything`` repeats one image over its prompts; here each prompt
of a call names its own image. A prompt has some seven tokens and thousands of cells, so nearly all
operations of the package are projections of cells to queries, keys and values. They are linear: a
product with a token can take the projection's matrix first, once per token, and then meet the cells
as they are. Upscaling moves no cell next to another one until the four masks are made. Cells keep
the layout of convolutions, channels first, so nothing is transposed on the way.
"""

import math
from typing import NamedTuple, cast

import torch
from jaxtyping import Float, Int32
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import Tensor, nn


class MaskPrediction(NamedTuple):
    """Masks of p prompts; mask 0 is the single-mask token, 1 to 3 the multimask outputs."""

    low_res_logits: Float[Tensor, "p 4 mh mw"]
    """Logits over the model frame at a quarter of the embedding's stride; above 0 is inside."""
    iou_predictions: Float[Tensor, "p 4"]
    """Predicted IoU of each mask with the object."""


def encode_points(
    prompt_encoder: PromptEncoder,
    point_coords: Float[Tensor, "p n 2"],
    point_labels: Int32[Tensor, "p n"],
) -> Float[Tensor, "p n d"]:
    """Sparse prompt embeddings, without indexing by masks and in float32 also under autocast.

    Args:
        prompt_encoder: Of the SAM.
        point_coords: (x, y) in pixels of the model frame.
        point_labels: 1 object, 0 background, 2 and 3 first and second box corner, -1 padding.
    """
    height, width = prompt_encoder.input_image_size
    frame = torch.tensor([width, height], dtype=torch.float32, device=point_coords.device)
    unit = 2 * (point_coords + 0.5) / frame - 1  # [-1, 1]; +0.5: centre of the pixel
    frequencies = prompt_encoder.pe_layer.positional_encoding_gaussian_matrix
    angles = unit[..., :1] * frequencies[0] + unit[..., 1:] * frequencies[1]
    position = torch.cat([torch.sin(2 * math.pi * angles), torch.cos(2 * math.pi * angles)], dim=-1)
    kinds = torch.cat(
        [
            prompt_encoder.not_a_point_embed.weight,
            *(embedding.weight for embedding in prompt_encoder.point_embeddings),
        ]
    )
    is_point = (point_labels >= 0).unsqueeze(-1)
    return torch.where(is_point, position, 0.0) + kinds[(point_labels + 1).long()]


def encode_masks(
    prompt_encoder: PromptEncoder, mask_inputs: Float[Tensor, "p 1 mh mw"] | None
) -> Float[Tensor, "q d h w"]:
    """Dense prompt embeddings; without masks q = 1 and h = w = 1, to be broadcast."""
    if mask_inputs is None:
        return prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    return prompt_encoder.mask_downscaling(mask_inputs)


def decode_masks(
    mask_decoder: MaskDecoder,
    embeddings: Float[Tensor, "p d h w"],
    *,
    image_pe: Float[Tensor, "1 d h w"],
    sparse: Float[Tensor, "p n d"],
) -> MaskPrediction:
    """All masks of p prompts in one call, each prompt with its own image.

    Args:
        mask_decoder: Of the SAM.
        embeddings: One per prompt (repeat an image's for each of its prompts): the image's, with
            ``encode_masks`` added.
        image_pe: ``PromptEncoder.get_dense_pe()``.
        sparse: From ``encode_points``.
    """
    prompt = torch.cat([mask_decoder.iou_token.weight, mask_decoder.mask_tokens.weight])
    prompt = torch.cat([prompt.expand(sparse.shape[0], -1, -1), sparse], dim=1)
    tokens, cells = attend_both_ways(
        mask_decoder.transformer,
        embeddings.flatten(2),
        cell_position=image_pe.flatten(2),
        prompt=prompt,
    )
    kernels = torch.stack(
        [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(mask_decoder.output_hypernetworks_mlps)],
        dim=1,
    )  # [p, 4, d / 8]
    logits = _masks_of_cells(mask_decoder.output_upscaling, cells, kernels, embeddings.shape[2:])
    return MaskPrediction(logits, mask_decoder.iou_prediction_head(tokens[:, 0]))


class TokensAndCells(NamedTuple):
    """The state of the two-way transformer, c cells in rows of the image."""

    tokens: Float[Tensor, "p t d"]
    cells: Float[Tensor, "p d c"]


def attend_both_ways(
    transformer: TwoWayTransformer,
    cells: Float[Tensor, "p d c"],
    *,
    cell_position: Float[Tensor, "1 d c"],
    prompt: Float[Tensor, "p t d"],
) -> TokensAndCells:
    """``TwoWayTransformer.forward``, the cells with channels first."""
    state = TokensAndCells(prompt, cells)
    for block in transformer.layers:
        state = _block(cast(TwoWayAttentionBlock, block), state, cell_position, prompt)
    tokens, cells = state
    read = _read_cells(
        transformer.final_attn_token_to_image, tokens + prompt, cells + cell_position, cells
    )
    return TokensAndCells(transformer.norm_final_attn(tokens + read), cells)


def _block(
    block: TwoWayAttentionBlock,
    state: TokensAndCells,
    cell_position: Float[Tensor, "1 d c"],
    prompt: Float[Tensor, "p t d"],
) -> TokensAndCells:
    tokens, cells = state
    if block.skip_first_layer_pe:  # the first block's tokens are the prompt itself
        tokens = block.self_attn(q=tokens, k=tokens, v=tokens)
    else:
        at = tokens + prompt
        tokens = tokens + block.self_attn(q=at, k=at, v=tokens)
    tokens = block.norm1(tokens)
    placed = cells + cell_position
    read = _read_cells(block.cross_attn_token_to_image, tokens + prompt, placed, cells)
    tokens = block.norm2(tokens + read)
    tokens = block.norm3(tokens + block.mlp(tokens))
    written = _write_cells(block.cross_attn_image_to_token, placed, tokens + prompt, tokens)
    return TokensAndCells(tokens, _normalize_channels(cells + written, block.norm4))


def _read_cells(
    attention: Attention,
    queries: Float[Tensor, "p t d"],
    keys: Float[Tensor, "p d c"],
    values: Float[Tensor, "p d c"],
) -> Float[Tensor, "p t d"]:
    """Attention of tokens to cells, h heads of e channels.

    ``query . (K cell + b)`` is ``(K^T query) . cell`` plus what all cells share, which a softmax
    over them ignores; weights that add up to 1 may meet the values before their projection.
    """
    heads = attention.num_heads
    per_head = _split_heads(attention.q_proj(queries), heads)  # [p, h, t, e]
    probes = _scaled(per_head) @ attention.k_proj.weight.unflatten(0, (heads, -1))  # [p, h, t, d]
    weights = torch.softmax(probes.flatten(1, 2) @ keys, dim=-1)  # [p, h t, c]
    read = (weights @ values.transpose(1, 2)).unflatten(1, (heads, -1))  # [p, h, t, d]
    projection = attention.v_proj.weight.unflatten(0, (heads, -1))  # [h, e, d]
    bias = attention.v_proj.bias.unflatten(0, (heads, 1, -1))  # [h, 1, e]
    return attention.out_proj(_join_heads(read @ projection.transpose(1, 2) + bias))


def _write_cells(
    attention: Attention,
    queries: Float[Tensor, "p d c"],
    keys: Float[Tensor, "p t d"],
    values: Float[Tensor, "p t d"],
) -> Float[Tensor, "p d c"]:
    """Attention of cells to tokens, h heads of e channels.

    The token's key takes the queries' projection, and its value the one of the output.
    """
    heads = attention.num_heads
    per_head = _scaled(_split_heads(attention.k_proj(keys), heads))  # [p, h, t, e]
    probes = per_head @ attention.q_proj.weight.unflatten(0, (heads, -1))  # [p, h, t, d]
    offsets = per_head @ attention.q_proj.bias.unflatten(0, (heads, -1, 1))  # [p, h, t, 1]
    scores = (probes.flatten(1, 2) @ queries).unflatten(1, (heads, -1)) + offsets
    weights = torch.softmax(scores, dim=2)  # over the tokens; [p, h, t, c]
    projection = attention.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)  # [h, e, d]
    written = _split_heads(attention.v_proj(values), heads) @ projection  # [p, h, t, d]
    written = written + attention.out_proj.bias / heads  # each head's weights add up to 1
    return written.flatten(1, 2).transpose(1, 2) @ weights.flatten(1, 2)


def _split_heads(tokens: Float[Tensor, "p t i"], heads: int) -> Float[Tensor, "p h t e"]:
    return tokens.unflatten(2, (heads, -1)).transpose(1, 2)


def _join_heads(tokens: Float[Tensor, "p h t e"]) -> Float[Tensor, "p t i"]:
    return tokens.transpose(1, 2).flatten(2)


def _scaled(per_head: Float[Tensor, "p h t e"]) -> Float[Tensor, "p h t e"]:
    """By attention's temperature, where there are few numbers to multiply."""
    return per_head * (per_head.shape[-1] ** -0.5)


def _normalize_channels(
    cells: Float[Tensor, "p d c"], norm: nn.LayerNorm | LayerNorm2d
) -> Float[Tensor, "p d c"]:
    """A layer norm over axis 1."""
    centred = cells - cells.mean(dim=1, keepdim=True)
    spread = (centred * centred).mean(dim=1, keepdim=True)
    normal = centred * torch.rsqrt(spread + norm.eps)
    return normal * norm.weight.unsqueeze(-1) + norm.bias.unsqueeze(-1)


def _masks_of_cells(
    upscaling: nn.Sequential,
    cells: Float[Tensor, "p d c"],
    kernels: Float[Tensor, "p m k"],
    size: torch.Size,
) -> Float[Tensor, "p m mh mw"]:
    """Two transposed convolutions of stride and side 2, and their product with the kernels.

    Such a convolution makes four cells of one and looks at no neighbour: it is a matrix, and the
    four may stay side by side in memory until the masks are made.
    """
    first, norm, activation, second, last_activation = upscaling
    quarters = _quarter(first, cells)  # [p, d / 4, 4 c]: which of the four, cell
    quarters = activation(_normalize_channels(quarters, norm))
    pixels = last_activation(_quarter(second, quarters))  # [p, d / 8, 16 c]: second four, first
    return _in_place(kernels @ pixels, size)


def _quarter(convolution: nn.Module, cells: Float[Tensor, "p i c"]) -> Float[Tensor, "p o n"]:
    """What the transposed convolution puts in place of each cell, in the order (y, x, cell)."""
    assert isinstance(convolution, nn.ConvTranspose2d)
    assert convolution.bias is not None  # as SAM builds it
    matrix = convolution.weight.flatten(1).transpose(0, 1)  # [o 4, i]
    out = (matrix @ cells).unflatten(1, (convolution.out_channels, 4)).flatten(2)
    return out + convolution.bias.unsqueeze(-1)


def _in_place(logits: Float[Tensor, "p m n"], size: torch.Size) -> Float[Tensor, "p m mh mw"]:
    """From the order (y2, x2, y1, x1, h, w) of the second and first fours and the cells to rows of
    pixels (h, y1, y2) and columns (w, x1, x2).

    Axes are moved one after the other: ONNX Runtime does that three times as fast as
    ``pixel_shuffle`` or one permutation.
    """
    prompts, masks, _ = logits.shape
    height, width = size
    x2_last = logits.reshape(-1, 2, 4 * height * width).transpose(1, 2)
    x1_before = x2_last.reshape(-1, 2, height * width, 2).transpose(1, 2)
    rows = x1_before.reshape(-1, 2, 2, height, 4 * width).permute(0, 3, 2, 1, 4)
    return rows.reshape(prompts, masks, 4 * height, 4 * width)
