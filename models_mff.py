"""Multi-level Feature Fusion (MFF) for masked autoencoders, in one file.

Liu, Zhang, Chen, Yu, Chen, Lin: "Improving Pixel-based MIM by Reducing Wasted Modeling Capability",
ICCV 2023, arXiv 2308.00261. tests/test_model.py compares every number with mmpretrain 1.2.0's MFF.

A masked autoencoder (MAE) whose decoder sees several encoder blocks, not the last alone (figure 3):

    image -> visible patches -> block 0 -> ... -> block i -> ... -> last block
                                   |                 |                 |
                                  x_1      ...      x_k      ...      x_K       K fused levels
                                   |                 |                 |
                                  P_1               P_k             identity    P_k: Linear, k < K
                                   |                 |                 |
                                   +-- z = sum_k softmax(w)_k P_k(x_k) +        w: K trained numbers
                                                     |
                                           latent = LayerNorm(z)           the encoder's final norm
                                                     |
                            mask tokens -> decoder -> pixels of the hidden patches

w starts as ones, so every level starts with weight 1/K. Lines marked "# MFF" are what MFF adds to
MAE; with K = 1 none of them has an effect, and the model is exactly MAE. Downstream the fusion is
dropped: the encoder has the parameter names of timm's VisionTransformer.

Deviations from the reference: none in the arithmetic. Images and patch grids may be rectangles.

Shapes: N batch, L patches, V = int(L * (1 - mask_ratio)) visible patches, D encoder width,
E decoder width, K fused levels, p patch size, C channels.
"""

from functools import partial

import torch
import torch.nn as nn
from timm.layers import PatchEmbed, build_sincos2d_pos_embed, to_2tuple
from timm.models.vision_transformer import Block, VisionTransformer
from torch.utils.checkpoint import checkpoint

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
ViTBlock = partial(Block, qkv_bias=True, norm_layer=LayerNorm)


class MaskedAutoencoderMFF(nn.Module):
    """Masked autoencoder with multi-level feature fusion. Methods stand in the order of their use.

    Args:
        img_size: side, or (H, W), of the input in pixels; a multiple of patch_size.
        patch_size: side p of a square patch in pixels.
        in_chans: image channels C.
        embed_dim, depth, num_heads, mlp_ratio: the ViT encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: the decoder (same mlp_ratio).
        fuse_layers: increasing indices of the fused blocks, to depth - 1; that alone is MAE.
        norm_pix_loss: standardise each target patch by its own mean and variance.

    Raises:
        ValueError: if sizes do not divide, or fuse_layers is not a valid choice.
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
        check_width(embed_dim, num_heads)
        check_width(decoder_embed_dim, decoder_num_heads, 'decoder_')
        check_layers('fuse_layers', fuse_layers, depth)
        self.in_chans = in_chans
        self.fuse_layers = fuse_layers
        self.norm_pix_loss = norm_pix_loss
        self.grad_checkpointing = False  # see apply_block

        # --- Encoder: a ViT with timm's parameter names ---
        D, E = embed_dim, decoder_embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, D)
        L = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.register_buffer('pos_embed', torch.zeros(1, 1 + L, D))  # fixed
        blocks = (ViTBlock(D, num_heads, mlp_ratio) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(D)

        # --- Multi-level feature fusion: the paper's addition to MAE ---
        self.fuse_projs = nn.ModuleList(nn.Linear(D, D) for _ in fuse_layers[:-1])  # MFF: P_k
        if len(fuse_layers) > 1:
            # MFF: w. In 4-D, as in the reference: 1-D parameters have no weight decay, and w has.
            self.fuse_logits = nn.Parameter(torch.ones(len(fuse_layers), 1, 1, 1))  # MFF

        # --- Decoder ---
        self.decoder_embed = nn.Linear(D, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.register_buffer('decoder_pos_embed', torch.zeros(1, 1 + L, E))  # fixed
        blocks = (ViTBlock(E, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth))
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = LayerNorm(E)
        self.decoder_pred = nn.Linear(E, patch_size**2 * in_chans)
        self.initialize_weights()

    def initialize_weights(self):
        """The reference's (mmpretrain configs/_base_/models/mae_vit-base-p16.py, mae.py)."""
        # Linear: xavier-uniform weight (qkv as one matrix), zero bias. LayerNorm keeps 1 and 0.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Feed-forward biases: a tiny normal instead of zero.
        for block in [*self.blocks, *self.decoder_blocks]:
            nn.init.normal_(block.mlp.fc1.bias, std=1e-6)
            nn.init.normal_(block.mlp.fc2.bias, std=1e-6)
        # Patch embedding: like a Linear on the flattened patch; its bias keeps torch's default.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        # Position: fixed 2-D sin-cos, zero for the cls token. The reference's order is [sin row,
        # cos row, sin column, cos column]: timm's, if interleaved.
        for pos_embed in (self.pos_embed, self.decoder_pos_embed):
            pos_embed[0, 1:] = build_sincos2d_pos_embed(
                self.patch_embed.grid_size, pos_embed.shape[-1], interleave_sin_cos=True
            )

    def no_weight_decay(self):
        """Names without weight decay beside norms and biases; P_k and the fusion logits decay."""
        return {'cls_token', 'mask_token'}

    @property
    def fusion_weights(self):
        """softmax(w), the weight of each fused level, shape (K,). 1 for plain MAE."""
        if len(self.fuse_layers) == 1:
            return self.cls_token.new_ones(1)
        return self.fuse_logits.flatten().softmax(0)

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """Loss, prediction and mask of a batch of images.

        Args:
            imgs: (N, C, H, W), normalised.
            mask_ratio: share of the patches that the encoder does not see; at 0 the loss is nan.
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
        x = self.prepend_cls(x)  # (N, 1+V, D)
        levels = []  # MFF
        for i, block in enumerate(self.blocks):
            x = self.apply_block(block, x)  # (N, 1+V, D)
            if i in self.fuse_layers:  # MFF
                levels.append(x)  # MFF
        x = self.fuse(levels)  # MFF; MAE goes on with the last block's x
        return self.norm(x), mask, ids_restore

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

    def prepend_cls(self, x):
        """x (N, V, D) -> (N, 1+V, D)."""
        cls_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def fuse(self, levels):
        """z = sum_k softmax(w)_k P_k(x_k): K times (N, 1+V, D) -> (N, 1+V, D). Figure 3."""
        if len(levels) == 1:
            return levels[0]  # plain MAE
        projected = [proj(x) for proj, x in zip(self.fuse_projs, levels)] + [levels[-1]]  # MFF
        return sum(w * x for w, x in zip(self.fusion_weights, projected))  # MFF

    def forward_decoder(self, latent, ids_restore):
        """latent (N, 1+V, D), ids_restore (N, L) -> pred (N, L, p*p*C)."""
        x = self.decoder_embed(latent)  # (N, 1+V, E)
        N, L = ids_restore.shape
        mask_tokens = self.mask_token.to(x.dtype).expand(N, 1 + L - x.shape[1], -1)  # (N, L-V, E)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)  # (N, L, E) shuffled
        ids_restore = ids_restore.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        patches = patches.gather(1, ids_restore)  # (N, L, E) in place
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

    def apply_block(self, block, x):
        """block(x); with grad_checkpointing the backward pass computes its activations again."""
        return checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)

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

    @torch.no_grad()
    def forward_features(self, imgs):
        """imgs (N, C, H, W) -> (N, 1+L, D), no gradients: as timm's encoder, no mask, no fusion.

        The final norm was trained on z, the fused levels, and sees the last level alone here.
        """
        x = self.patch_embed(imgs) + self.pos_embed[:, 1:]  # (N, L, D)
        x = self.prepend_cls(x)  # (N, 1+L, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


# --- Argument checks ------------------------------------------------------------------------------


def check_image_size(img_size, patch_size):
    """Raise ValueError unless img_size (H, W) is made of whole patches."""
    if patch_size < 1 or any(side < patch_size or side % patch_size for side in img_size):
        raise ValueError(
            f'image size {img_size[0]} x {img_size[1]} is not a multiple of patch size {patch_size}'
        )


def check_width(dim, num_heads, prefix=''):
    """Raise ValueError unless a width divides into heads and the position embedding's 4 parts."""
    if dim % 4 or dim % num_heads:
        raise ValueError(
            f'{prefix}embed_dim {dim} must be a multiple of 4 and of {prefix}num_heads {num_heads}'
        )


def check_layers(name, layers, depth):
    """Raise ValueError unless the layers are increasing block indices up to the last block."""
    if (
        not layers
        or list(layers) != sorted(set(layers))
        or layers[0] < 0
        or layers[-1] != depth - 1
    ):
        raise ValueError(
            f'{name} {list(layers)} must be increasing block indices, up to the last, {depth - 1}'
        )


# --- Model sizes ----------------------------------------------------------------------------------


def default_fuse_layers(depth):
    """Fused layers for any depth: every block, or every second to fourth, from 0, and the last.

    Gives the paper's choice at depth 12 and that of public uses of MFF at depths 24 and 32.
    """
    step = max(1, min(4, depth // 6))
    return tuple(sorted({*range(0, max(1, depth - 2), step), depth - 1}))


ENCODER = ('img_size', 'in_chans', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')
DECODER = ('decoder_embed_dim', 'decoder_depth', 'decoder_num_heads', 'fuse_layers')

# Fused layers: the paper's for ViT-B; the authors' prototype for ViT-S; public uses of MFF for
# depths 24 and 32. Nano, for CPUs, and tiny are ours.
MODELS = {
    # image side, channels, patch; encoder width, depth, heads, mlp; decoder width, depth, heads
    'vit_nano_patch4': (32, 3, 4, 64, 4, 4, 4.0, 64, 1, 4, (0, 1, 2, 3)),
    'vit_tiny_patch4': (32, 3, 4, 192, 12, 3, 4.0, 96, 4, 3, (0, 2, 4, 6, 8, 11)),
    'vit_small_patch16': (224, 3, 16, 384, 12, 6, 4.0, 384, 8, 12, (3, 5, 7, 11)),
    'vit_base_patch16': (224, 3, 16, 768, 12, 12, 4.0, 512, 8, 16, (0, 2, 4, 6, 8, 11)),
    'vit_large_patch16': (224, 3, 16, 1024, 24, 16, 4.0, 512, 8, 16, (0, 4, 8, 12, 16, 20, 23)),
    'vit_huge_patch14': (224, 3, 14, 1280, 32, 16, 4.0, 512, 8, 16, (*range(0, 29, 4), 31)),
}
MODELS = {name: dict(zip(ENCODER + DECODER, sizes)) for name, sizes in MODELS.items()}


def model_sizes(name, **changes):
    """The arguments of MaskedAutoencoderMFF for one of MODELS, with changes.

    Args:
        name: of MODELS; 'mff_' before it is accepted.
        changes: any of the arguments; None leaves one as it is. A new depth: default_fuse_layers.

    Returns:
        dict, with img_size as (H, W) and in_chans.

    Raises:
        ValueError: for an unknown name.
    """
    name = name.removeprefix('mff_')
    if name not in MODELS:
        raise ValueError(f"no model '{name}'; there are {', '.join(MODELS)}")
    changes = {key: value for key, value in changes.items() if value is not None}
    sizes = MODELS[name] | changes
    if 'fuse_layers' not in changes and sizes['depth'] != MODELS[name]['depth']:
        sizes['fuse_layers'] = default_fuse_layers(sizes['depth'])
    sizes['img_size'] = to_2tuple(sizes['img_size'])
    sizes['fuse_layers'] = tuple(sizes['fuse_layers'])
    return sizes


# --- Downstream: the plain encoder ----------------------------------------------------------------


def create_encoder(sizes, global_pool='avg', drop_path=0.0):
    """timm's VisionTransformer of an encoder's size, without a head. The fusion is dropped.

    Args:
        sizes: as model_sizes gives them; what belongs to decoder and fusion is ignored.
        global_pool: 'avg': the mean of the patch tokens, then a LayerNorm of its own (fine-tuning);
            'token': the final LayerNorm, then the cls token (linear probe).
        drop_path: rate at the last block, growing linearly from 0 at the first.

    Raises:
        ValueError: if the image size is no multiple of the patch size, or the width of the heads.
    """
    check_image_size(to_2tuple(sizes['img_size']), sizes['patch_size'])
    check_width(sizes['embed_dim'], sizes['num_heads'])
    encoder = {name: sizes[name] for name in ENCODER}
    return VisionTransformer(
        **encoder, num_classes=0, global_pool=global_pool, drop_path_rate=drop_path
    )


def random_encoder(sizes):
    """create_encoder(sizes, 'token') with weights as pre-training starts from, not timm's."""
    start = MaskedAutoencoderMFF(**sizes | {'fuse_layers': [sizes['depth'] - 1]}).state_dict()
    encoder = create_encoder(sizes, 'token').eval()
    encoder.load_state_dict({name: start[name] for name in encoder.state_dict()})
    return encoder
