"""The paper's alternatives to its own design: other projections, other fusions, PixMIM's target.

The paper compares them, concludes that a linear projection and a weighted average are enough, and
also fuses PixMIM. Its own choice is models_mff.py, where fuse_layers chooses the levels. Downstream
all of this is dropped, as the fusion always is.
"""

import torch
import torch.nn as nn
from timm.models.vision_transformer import Attention

from models_mff import LayerNorm, MaskedAutoencoderMFF

CHOICES = {  # the first of each is the paper's own
    'fuse_proj': ['linear', 'none', 'mlp'],
    'fusion': ['average', 'uniform', 'attention'],
    'target': ['pixels', 'lowpass'],
}


class VariantMFF(MaskedAutoencoderMFF):
    """MaskedAutoencoderMFF with other parts; with the first of all CHOICES, exactly that.

    Args:
        fuse_proj: P_k of the levels below the last: linear, none, or an MLP of two layers.
        fusion: the average by trained weights, the uniform one, or self-attention over the levels.
        target: the pixels, or PixMIM's, without high frequencies.
        mean, std: of the pixels, per channel, by which images are normalised; for PixMIM.
        sizes: of MaskedAutoencoderMFF. Raises ValueError as that does.
    """

    def __init__(
        self, fuse_proj='linear', fusion='average', target='pixels', mean=None, std=None, **sizes
    ):
        super().__init__(**sizes)
        self.fusion, self.target = fusion, target
        D, K = self.cls_token.shape[-1], len(self.fuse_layers)
        if K == 1 and (fuse_proj, fusion) != ('linear', 'average'):
            raise ValueError('--fuse_proj and --fusion need several --fuse_layers')

        # --- Projection P_k, k < K ---
        if fuse_proj == 'none':
            self.fuse_projs = nn.ModuleList(nn.Identity() for _ in self.fuse_projs)
        elif fuse_proj == 'mlp':
            self.fuse_projs = nn.ModuleList(
                nn.Sequential(proj, nn.GELU(), initialised(nn.Linear(D, D)))
                for proj in self.fuse_projs
            )

        # --- Fusion ---
        if fusion == 'uniform':
            del self.fuse_logits
            self.register_buffer('fuse_logits', torch.ones(K, 1, 1, 1))  # not trained
        elif fusion == 'attention':
            del self.fuse_logits
            self.fuse_norm = LayerNorm(D)
            self.fuse_attn = Attention(D, self.blocks[0].attn.num_heads, qkv_bias=True)
            initialised(self.fuse_attn.qkv)
            initialised(self.fuse_attn.proj)

        # --- Target (PixMIM, arXiv 2303.02416) ---
        if target == 'lowpass':
            self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
            self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), persistent=False)
            # In checkpoints, so that main_pretrain.py does not resume one of another target
            self.register_buffer('decoder_frequencies', low_frequencies(*self.patch_embed.img_size))

    @property
    def fusion_weights(self):
        """As in MaskedAutoencoderMFF; none, (0,), where attention decides for each token."""
        return self.cls_token.new_empty(0) if self.fusion == 'attention' else super().fusion_weights

    def fuse(self, levels):
        """K times (N, 1+V, D) -> (N, 1+V, D); attention: mean_k (y + Attention(LayerNorm(y)))_k.

        y_k = P_k(x_k). The K levels of a token are the sequence, so tokens do not mix. The paper
        names self-attention as the alternative; norm, residual and mean are ours.
        """
        if self.fusion != 'attention':
            return super().fuse(levels)
        projected = [proj(x) for proj, x in zip(self.fuse_projs, levels)] + [levels[-1]]
        y = torch.stack(projected, dim=2).flatten(0, 1)  # (N*(1+V), K, D)
        y = y + self.fuse_attn(self.fuse_norm(y))
        return y.mean(1).view_as(levels[-1])

    def patchify(self, imgs):
        """The patches to predict, (N, L, p*p*C): of the target image."""
        return super().patchify(self.target_image(imgs))

    def target_image(self, imgs):
        """What the decoder is to predict, (N, C, H, W), normalised like imgs.

        PixMIM: (|IFFT2(fftshift(FFT2(x)) * M)| - mean) / std of the un-normalised x. Nothing is
        shifted back before the inverse: the modulus removes the modulation that this leaves.
        """
        if self.target == 'pixels':
            return imgs
        pixels = imgs.float() * self.std + self.mean
        spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
        filtered = torch.fft.ifft2(spectrum * self.decoder_frequencies).abs()
        return (filtered - self.mean) / self.std


def low_frequencies(height, width, radius=40 / 224):
    """PixMIM's M (H, W): 1 in the disc around ((H-1)/2, (W-1)/2), of radius 40 at 224 pixels.

    At other sizes in proportion, which is ours: of 32 pixels, 40 would leave out nothing.
    """
    rows = (torch.arange(height) - (height - 1) / 2) / height
    columns = (torch.arange(width) - (width - 1) / 2) / width
    return ((rows.square()[:, None] + columns.square()).sqrt() <= radius).float()


def initialised(linear):
    """As every Linear of the model: xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
