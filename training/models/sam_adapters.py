"""SAM as two modules with the tensors of the served contracts: image encoder and mask decoder.

Both can be exported by the dynamo exporter with every batch axis dynamic. They share the weights of
the SAM they wrap; a served SAM and a trained one differ in nothing else.
"""

import torch
from jaxtyping import Float, Int32, UInt8
from segment_anything.modeling import Sam
from torch import Tensor, nn

from training.models.sam_decoder import (
    MaskPrediction,
    decode_masks,
    encode_masks,
    encode_points,
)


def normalize_images(
    images: Float[Tensor, "b 3 s s"] | UInt8[Tensor, "b 3 s s"],
    valid_size: Int32[Tensor, "b 2"],
    *,
    mean: Float[Tensor, "3 1 1"],
    std: Float[Tensor, "3 1 1"],
) -> Float[Tensor, "b 3 s s"]:
    """Normalised images, zero beyond the picture: ``Sam.preprocess`` for a batch.

    Args:
        images: RGB in [0, 255]; anything beyond the picture.
        valid_size: (height, width) of the picture at the top left of the frame.
        mean: Per channel, on the scale of ``images``.
        std: Per channel, on the scale of ``images``.
    """
    rows = torch.arange(images.shape[2], device=images.device, dtype=valid_size.dtype)
    columns = torch.arange(images.shape[3], device=images.device, dtype=valid_size.dtype)
    in_height = rows < valid_size[:, :1]  # [b, s]
    in_width = columns < valid_size[:, 1:]  # [b, s]
    inside = in_height[:, None, :, None] & in_width[:, None, None, :]
    return torch.where(inside, (images.float() - mean) / std, 0.0)


class SamImageEncoderAdapter(nn.Module):
    """Pixels in, image embeddings out: the contract of ``sam_image_encoder``."""

    mean: Tensor
    std: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.image_encoder = sam.image_encoder
        self.register_buffer("mean", sam.pixel_mean.clone(), persistent=False)
        self.register_buffer("std", sam.pixel_std.clone(), persistent=False)

    def forward(
        self, image: UInt8[Tensor, "b s s 3"], valid_size: Int32[Tensor, "b 2"]
    ) -> Float[Tensor, "b d h w"]:
        """Image embeddings.

        Args:
            image: RGB, the longest side resized to the frame, at the top left; anything beyond it.
            valid_size: (height, width) of the picture in the frame.
        """
        images = image.permute(0, 3, 1, 2)
        return self.image_encoder(
            normalize_images(images, valid_size, mean=self.mean, std=self.std)
        )


class SamMaskDecoderAdapter(nn.Module):
    """Image embeddings and packed prompts in, masks out: the contract of ``sam_mask_decoder``."""

    image_pe: Tensor

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.prompt_encoder = sam.prompt_encoder
        self.mask_decoder = sam.mask_decoder
        self.register_buffer("image_pe", sam.prompt_encoder.get_dense_pe(), persistent=False)

    def forward(
        self,
        image_embeddings: Float[Tensor, "i d h w"],
        image_index: Int32[Tensor, " p"],
        point_coords: Float[Tensor, "p n 2"],
        point_labels: Int32[Tensor, "p n"],
    ) -> MaskPrediction:
        """Masks of p prompts on i images.

        ``SamPredictor`` gives the same for points followed by one padding point, and for the two
        corners of a box alone.

        Args:
            image_embeddings: Of the encoder.
            image_index: The image of each prompt, in [0, i).
            point_coords: (x, y) in pixels of the model frame.
            point_labels: 1 object, 0 background, 2 and 3 box corners, -1 padding.
        """
        prompted = image_embeddings + encode_masks(self.prompt_encoder, None)
        return decode_masks(
            self.mask_decoder,
            prompted[image_index.long()],
            image_pe=self.image_pe,
            sparse=encode_points(self.prompt_encoder, point_coords, point_labels),
        )
