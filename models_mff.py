"""Multi-level Feature Fusion (MFF) for masked autoencoders, in one file.

Liu, Zhang, Chen, Yu, Chen, Lin: "Improving Pixel-based MIM by Reducing Wasted Modeling Capability",
ICCV 2023, arXiv 2308.00261. Equal to mmpretrain 1.2.0's MFF: tests/test_model.py compares every number.

A masked autoencoder (MAE) whose decoder sees more than the encoder's last block. With x_i the output of
encoder block i, and fused layers i_1 < ... < i_K of which the last is the last block:

    z      = sum_k softmax(w)_k * P_k(x_{i_k})       P_k: Linear for k < K, the identity for k = K
    latent = LayerNorm(z)                            the encoder's final norm, over all tokens, cls included

w starts as ones: every level starts with weight 1/K. Everything else is MAE. K = 1 is exactly MAE, without
any fusion parameter. Downstream the fusion is dropped: the encoder's names are those of timm's
VisionTransformer, so its weights load there as they are.

Deviations from the reference: none in the arithmetic. Images and patch grids may be rectangular, where the
first half of the position embedding encodes the row and the second the column.

Shapes: N batch, L patches, V = int(L * (1 - mask_ratio)) visible ones, D encoder width, E decoder width,
K fused levels, p patch size, C channels.
"""

from functools import partial

import torch
import torch.nn as nn
from timm.layers import PatchEmbed, build_sincos2d_pos_embed, to_2tuple
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.checkpoint import checkpoint

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class MaskedAutoencoderMFF(nn.Module):
    """Masked autoencoder with multi-level feature fusion.

    Args:
        img_size: side, or (H, W), of the input in pixels; a multiple of patch_size.
        patch_size: side p of a square patch in pixels.
        in_chans: image channels C.
        embed_dim, depth, num_heads, mlp_ratio: the ViT encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder (same mlp_ratio).
        fuse_layers: indices of the fused blocks, strictly increasing; the last must be depth - 1.
        norm_pix_loss: standardise each target patch by its own mean and variance.

    Raises:
        ValueError: if sizes do not divide or fuse_layers is no such choice.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        fuse_layers=(0, 2, 4, 6, 8, 11),
        norm_pix_loss=True,
    ):
        super().__init__()
        img_size, fuse_layers = to_2tuple(img_size), tuple(fuse_layers)
        check_image_size(img_size, patch_size)
        for name, dim, heads in [('', embed_dim, num_heads), ('decoder_', decoder_embed_dim, decoder_num_heads)]:
            if dim % 4 or dim % heads:
                raise ValueError(
                    f'{name}embed_dim {dim} must be a multiple of 4 (position embedding) and of {name}num_heads {heads}'
                )
        if list(fuse_layers) != sorted(set(fuse_layers)) or not fuse_layers or fuse_layers[0] < 0:
            raise ValueError(f'fuse_layers {list(fuse_layers)} must be increasing block indices from 0')
        if fuse_layers[-1] != depth - 1:
            raise ValueError(
                f'fuse_layers {list(fuse_layers)} must end with the last block, which is {depth - 1} at depth {depth}'
            )
        self.in_chans, self.fuse_layers, self.norm_pix_loss = in_chans, fuse_layers, norm_pix_loss
        self.grad_checkpointing = False  # see apply_block

        # --- Encoder: a ViT with timm's parameter names -----------------------------------------------------
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        num_patches = self.patch_embed.num_patches  # L
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer('pos_embed', torch.zeros(1, 1 + num_patches, embed_dim))  # fixed
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)
        )
        self.norm = LayerNorm(embed_dim)

        # --- Multi-level feature fusion: the paper's addition to MAE ----------------------------------------
        self.fuse_projs = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in fuse_layers[:-1])  # P_k, k < K
        if len(fuse_layers) > 1:
            self.fuse_logits = nn.Parameter(torch.ones(len(fuse_layers), 1, 1, 1))  # w

        # --- Decoder ----------------------------------------------------------------------------------------
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.register_buffer('decoder_pos_embed', torch.zeros(1, 1 + num_patches, decoder_embed_dim))  # fixed
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(decoder_depth)
        )
        self.decoder_norm = LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)
        self.initialize_weights()

    def initialize_weights(self):
        """The reference's initialisation (mmpretrain configs/_base_/models/mae_vit-base-p16.py, mae.py)."""
        # Every Linear: xavier-uniform weight, zero bias (qkv as one matrix). LayerNorm keeps torch's 1 and 0.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Feed-forward biases: a tiny normal instead of zero.
        for block in [*self.blocks, *self.decoder_blocks]:
            nn.init.normal_(block.mlp.fc1.bias, std=1e-6)
            nn.init.normal_(block.mlp.fc2.bias, std=1e-6)
        # Patch embedding: like a Linear on the flattened patch; its bias keeps the convolution's default.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        # Position: fixed 2-D sin-cos, [sin row, cos row, sin column, cos column]; zero for the cls token.
        for pos_embed in (self.pos_embed, self.decoder_pos_embed):
            pos_embed[0, 1:] = build_sincos2d_pos_embed(
                self.patch_embed.grid_size, pos_embed.shape[-1], interleave_sin_cos=True
            )

    def no_weight_decay(self):
        """Names without weight decay besides norms and biases. P_k and the fusion logits do decay."""
        return {'cls_token', 'mask_token'}

    @property
    def fusion_weights(self):
        """softmax(w), the weight of each fused level, shape (K,)."""
        if len(self.fuse_layers) == 1:
            return self.cls_token.new_ones(1)
        return self.fuse_logits.flatten().softmax(0)

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """Loss, prediction and mask of a batch of images.

        Args:
            imgs: (N, C, H, W), normalised.
            mask_ratio: share of the patches that the encoder does not see, in [0, 1); at 0 there is no loss (nan).
            noise: (N, L) in [0, 1), the patches with the smallest stay visible; None: drawn here.

        Returns:
            loss (), pred (N, L, p*p*C), mask (N, L) with 1 where a patch was removed.
        """
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def forward_encoder(self, imgs, mask_ratio=0.75, noise=None):
        """imgs (N, C, H, W) -> fused latent (N, 1+V, D), mask (N, L), ids_restore (N, L)."""
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # (N, L, D)
        x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)  # (N, V, D)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)  # (N, 1+V, D)
        levels = []
        for i, block in enumerate(self.blocks):
            x = self.apply_block(block, x)
            if i in self.fuse_layers:
                levels.append(x)
        return self.norm(self.fuse(levels)), mask, ids_restore

    def random_masking(self, x, mask_ratio, noise=None):
        """Keep the V patches of x (N, L, D) with the smallest noise; per sample, as MAE does."""
        N, L, D = x.shape
        num_visible = int(L * (1 - mask_ratio))
        if noise is None:
            noise = torch.rand(N, L, device=x.device)
        ids_shuffle = noise.argsort(dim=1)  # visible first
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_visible = ids_shuffle[:, :num_visible]
        visible = x.gather(1, ids_visible.unsqueeze(-1).expand(-1, -1, D))  # (N, V, D)
        mask = (ids_restore >= num_visible).float()  # (N, L)
        return visible, mask, ids_restore

    def fuse(self, levels):
        """z = sum_k softmax(w)_k P_k(x_k): K tensors (N, 1+V, D) -> (N, 1+V, D). Paper, figure 3."""
        if len(levels) == 1:
            return levels[0]  # plain MAE
        projected = [proj(x) for proj, x in zip(self.fuse_projs, levels)] + [levels[-1]]
        return sum(w * x for w, x in zip(self.fusion_weights, projected))

    def apply_block(self, block, x):
        """block(x); with grad_checkpointing the backward pass computes its activations again, and none are kept."""
        return checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)

    def forward_decoder(self, latent, ids_restore):
        """latent (N, 1+V, D), ids_restore (N, L) -> pred (N, L, p*p*C)."""
        x = self.decoder_embed(latent)  # (N, 1+V, E)
        N, L = ids_restore.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(N, 1 + L - x.shape[1], -1)  # (N, L-V, E)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)  # (N, L, E) shuffled
        patches = patches.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # (N, L, E) in place
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (N, 1+L, E)
        for block in self.decoder_blocks:
            x = self.apply_block(block, x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # without cls

    def forward_loss(self, imgs, pred, mask):
        """Mean squared error over the pixels of the masked patches of the batch, in fp32."""
        target = self.patchify(imgs.float())  # (N, L, p*p*C)
        if self.norm_pix_loss:
            mean = target.mean(dim=-1, keepdim=True)
            var = target.var(dim=-1, keepdim=True)  # unbiased
            target = (target - mean) / (var + 1e-6).sqrt()
        loss = (pred.float() - target).square().mean(dim=-1)  # (N, L)
        return (loss * mask).sum() / mask.sum()

    def patchify(self, imgs):
        """imgs (N, C, H, W) -> patches (N, L, p*p*C), each in the order row, column, channel."""
        (h, w), (p, _) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = imgs.reshape(-1, self.in_chans, h, p, w, p)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w, p * p * self.in_chans)

    def unpatchify(self, pred):
        """pred (N, L, p*p*C) -> imgs (N, C, H, W), the inverse of patchify."""
        (h, w), (p, _) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = pred.reshape(-1, h, w, p, p, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_chans, h * p, w * p)


def check_image_size(img_size, patch_size):
    """Raise ValueError if img_size (H, W) is not made of whole patches."""
    if any(side < patch_size or side % patch_size for side in img_size):
        raise ValueError(f'image size {img_size[0]} x {img_size[1]} is not a multiple of patch size {patch_size}')


# Model sizes. Fused layers: the paper's for ViT-B; the authors' prototype for ViT-S; public use of MFF for
# depth 24 and 32. The tiny one is ours, for 32-pixel images.
MODELS = {
    'mff_vit_tiny_patch4': partial(
        MaskedAutoencoderMFF,
        img_size=32,
        patch_size=4,
        embed_dim=192,
        depth=12,
        num_heads=3,
        decoder_embed_dim=96,
        decoder_depth=4,
        decoder_num_heads=3,
    ),
    'mff_vit_small_patch16': partial(
        MaskedAutoencoderMFF,
        embed_dim=384,
        depth=12,
        num_heads=6,
        fuse_layers=(3, 5, 7, 11),
        decoder_embed_dim=384,
        decoder_num_heads=12,
    ),
    'mff_vit_base_patch16': partial(
        MaskedAutoencoderMFF, embed_dim=768, depth=12, num_heads=12, fuse_layers=(0, 2, 4, 6, 8, 11)
    ),
    'mff_vit_large_patch16': partial(
        MaskedAutoencoderMFF, embed_dim=1024, depth=24, num_heads=16, fuse_layers=(0, 4, 8, 12, 16, 20, 23)
    ),
    'mff_vit_huge_patch14': partial(
        MaskedAutoencoderMFF,
        patch_size=14,
        embed_dim=1280,
        depth=32,
        num_heads=16,
        fuse_layers=(0, 4, 8, 12, 16, 20, 24, 28, 31),
    ),
}


def create_model(name, img_size=None, in_chans=3, fuse_layers=None, norm_pix_loss=True):
    """A model of MODELS; None keeps what its size is defined with. Raises ValueError as the model does."""
    if name not in MODELS:
        raise ValueError(f"no model '{name}'; there are {', '.join(MODELS)}")
    given = {'img_size': img_size, 'fuse_layers': fuse_layers}
    return MODELS[name](
        in_chans=in_chans,
        norm_pix_loss=norm_pix_loss,
        **{key: value for key, value in given.items() if value is not None},
    )


def create_encoder(name, img_size=None, in_chans=3, global_pool='avg', drop_path=0.0):
    """timm's VisionTransformer of an encoder's size, for downstream work, where the fusion is dropped; without a head.

    Args:
        name: of MODELS, without 'mff_'.
        global_pool: 'avg', the mean of the patch tokens, then a LayerNorm of its own (fine-tuning), or 'token', the
            final LayerNorm, then the cls token (linear probing).
        drop_path: rate at the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: for an unknown name, or an image size that is not a multiple of the patch size.
    """
    if f'mff_{name}' not in MODELS:
        raise ValueError(f"no model '{name}'; there are {', '.join(key.removeprefix('mff_') for key in MODELS)}")
    sizes = {'img_size': 224, 'patch_size': 16, **MODELS[f'mff_{name}'].keywords}
    sizes = {key: sizes[key] for key in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads')}
    sizes['img_size'] = to_2tuple(img_size or sizes['img_size'])
    check_image_size(sizes['img_size'], sizes['patch_size'])
    return VisionTransformer(
        **sizes, in_chans=in_chans, num_classes=0, global_pool=global_pool, fc_norm=global_pool == 'avg',
        drop_path_rate=drop_path,
    )  # fmt: skip


def create_untrained_encoder(name, img_size=None, in_chans=3):
    """create_encoder(..., 'token') with weights as pre-training starts from, not timm's: what it is compared with."""
    encoder = create_encoder(name, img_size, in_chans, 'token')
    start = create_model(f'mff_{name}', img_size, in_chans).state_dict()
    encoder.load_state_dict({key: start[key] for key in encoder.state_dict()})
    return encoder
