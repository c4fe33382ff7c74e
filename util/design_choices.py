"""The paper's alternatives to its own design: other projections, other fusions, and PixMIM's target.

    python main_pretrain.py ... --fuse_proj none|linear|mlp --fusion average|uniform|attention --target pixels|lowpass

The paper compares projections and fusions in its ablation of the design, concludes that linear projection and weighted
average are enough, and also fuses PixMIM. That default is models_mff.py, to which nothing here is added; which layers
are fused is --fuse_layers there. Downstream all of it is dropped, as the fusion always is.
"""

import torch
import torch.nn as nn
from timm.models.vision_transformer import Attention

import models_mff
from models_mff import MODELS, LayerNorm, MaskedAutoencoderMFF
from util import transforms

CHOICES = {
    'fuse_proj': (['linear', 'none', 'mlp'], 'of the levels below the last; mlp: two layers with GELU'),
    'fusion': (['average', 'uniform', 'attention'], 'learned weights, 1/K for each, or self-attention over the levels'),
    'target': (['pixels', 'lowpass'], "lowpass: PixMIM's, without high frequencies"),
}
DEFAULTS = {name: options[0] for name, (options, _) in CHOICES.items()}


def add_arguments(parser):
    """--fuse_proj, --fusion and --target; the first of each is the paper's own choice."""
    group = parser.add_argument_group("the paper's alternatives (util/design_choices.py)")
    for name, (options, text) in CHOICES.items():
        group.add_argument(f'--{name}', choices=options, default=options[0], help=f'{text} (default: %(default)s)')


def create_model(args):
    """The model that a run's flags ask for: models_mff's own, unless one of CHOICES differs from its default.

    args may lack these flags, or hold None, as checkpoints do that are older than them.

    Raises:
        ValueError: as models_mff.create_model does, or where a choice has no effect.
    """
    model = models_mff.create_model(args.model, args.input_size, args.in_chans, args.fuse_layers, args.norm_pix_loss)
    chosen = {name: getattr(args, name, None) or default for name, default in DEFAULTS.items()}
    if chosen == DEFAULTS:
        return model
    sizes = {'img_size': model.patch_embed.img_size, 'fuse_layers': model.fuse_layers}
    return DesignChoices(
        **chosen,
        statistics=transforms.pixel_statistics(args),
        **MODELS[args.model].keywords | sizes,
        in_chans=args.in_chans,
        norm_pix_loss=args.norm_pix_loss,
    )


class DesignChoices(MaskedAutoencoderMFF):
    """MaskedAutoencoderMFF with other parts.

    Args:
        fuse_proj, fusion, target: as in CHOICES.
        statistics: (mean, std) of the pixels, by which the images are normalised; for target='lowpass'.
        sizes: as for MaskedAutoencoderMFF.
    """

    def __init__(self, fuse_proj='linear', fusion='average', target='pixels', statistics=None, **sizes):
        super().__init__(**sizes)
        self.fusion, self.lowpass = fusion, target == 'lowpass'
        D, K = self.cls_token.shape[-1], len(self.fuse_layers)
        if K == 1 and (fuse_proj, fusion) != ('linear', 'average'):
            raise ValueError('--fuse_proj and --fusion need several --fuse_layers; a single one is plain MAE')

        # --- Projection P_k, k < K (paper, design choices: projection) ---------------------------------------
        if fuse_proj == 'none':
            self.fuse_projs = nn.ModuleList(nn.Identity() for _ in self.fuse_projs)
        elif fuse_proj == 'mlp':
            self.fuse_projs = nn.ModuleList(
                nn.Sequential(proj, nn.GELU(), initialised(nn.Linear(D, D))) for proj in self.fuse_projs
            )

        # --- Fusion (paper, design choices: fusion) ----------------------------------------------------------
        if fusion != 'average':
            del self.fuse_logits
        if fusion == 'uniform':  # equal weights, which are not trained
            self.register_buffer('fuse_logits', torch.ones(K, 1, 1, 1))
        elif fusion == 'attention':
            self.fuse_norm = LayerNorm(D)
            self.fuse_attn = Attention(D, self.blocks[0].attn.num_heads, qkv_bias=True)
            initialised(self.fuse_attn.qkv), initialised(self.fuse_attn.proj)

        # --- Target (PixMIM, arXiv 2303.02416) ---------------------------------------------------------------
        if self.lowpass:
            mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
            self.register_buffer('pixel_mean', mean, persistent=False)
            self.register_buffer('pixel_std', std, persistent=False)
            self.register_buffer('frequencies', low_frequencies(*self.patch_embed.img_size), persistent=False)

    @property
    def fusion_weights(self):
        """As in MaskedAutoencoderMFF; none, shape (0,), where attention decides for each token."""
        return self.cls_token.new_empty(0) if self.fusion == 'attention' else super().fusion_weights

    def fuse(self, levels):
        """K tensors (N, 1+V, D) -> (N, 1+V, D); by attention: mean_k (y + Attention(LayerNorm(y)))_k, y_k = P_k(x_k).

        The K levels of a token are the sequence, so tokens do not mix. The paper names self-attention as the
        alternative; norm, residual and mean are ours.
        """
        if self.fusion != 'attention':
            return super().fuse(levels)
        projected = [proj(x) for proj, x in zip(self.fuse_projs, levels)] + [levels[-1]]
        y = torch.stack(projected, dim=2).flatten(0, 1)  # (N*(1+V), K, D)
        y = y + self.fuse_attn(self.fuse_norm(y))
        return y.mean(1).view_as(levels[-1])

    def forward_loss(self, imgs, pred, mask):
        """As in MaskedAutoencoderMFF, with PixMIM's target in the place of the image."""
        return super().forward_loss(self.low_frequency_target(imgs) if self.lowpass else imgs, pred, mask)

    def low_frequency_target(self, imgs):
        """PixMIM's target (|IFFT2(fftshift(FFT2(x)) * M)| - mean) / std of the un-normalised x; (N, C, H, W).

        Without a shift back before the inverse; the modulus removes the modulation that this leaves.
        """
        pixels = imgs.float() * self.pixel_std + self.pixel_mean
        spectrum = torch.fft.fftshift(torch.fft.fft2(pixels), dim=(-2, -1))
        return (torch.fft.ifft2(spectrum * self.frequencies).abs() - self.pixel_mean) / self.pixel_std


def low_frequencies(height, width, radius=40 / 224):
    """PixMIM's M (H, W): 1 in the disc around ((H-1)/2, (W-1)/2), of radius 40 at 224 pixels, in proportion elsewhere.

    In proportion, which is ours: of 32 pixels, a radius of 40 would leave out nothing.
    """
    rows, columns = torch.arange(height) - (height - 1) / 2, torch.arange(width) - (width - 1) / 2
    distance = ((rows / height).square()[:, None] + (columns / width).square()).sqrt()  # in units of the side
    return (distance <= radius).float()


def initialised(linear):
    """As every Linear of the model: xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
