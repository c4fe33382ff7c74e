"""The models for torch.hub: for pre-training and as encoders, of each size in models_mff.MODELS.

mae = torch.hub.load('OWNER/REPO', 'mff_vit_base_patch16', weights='checkpoint-last.pth')
vit = torch.hub.load('OWNER/REPO', 'mff_vit_base_patch16_encoder', weights='hf-hub:ORG/NAME')
"""

import models_mff as _models

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub']


def _entry(name, is_encoder):
    def entry(weights=None):
        from util.weights import load_encoder, load_model

        sizes = _models.model_sizes(name)
        if weights is None and is_encoder:
            return _models.random_encoder(sizes)
        if weights is None:
            return _models.MaskedAutoencoderMFF(**sizes).eval()
        model, settings = (load_encoder if is_encoder else load_model)(weights)
        theirs = {size: settings.sizes[size] for size in ('embed_dim', 'depth', 'patch_size')}
        if not theirs.items() <= sizes.items():
            raise ValueError(f'{weights}: not of {name}, but of {theirs}')
        in_chans, img_size = settings.sizes['in_chans'], settings.sizes['img_size']
        model.pretrained_cfg = {
            'input_size': (in_chans, *img_size),
            'mean': settings.mean,
            'std': settings.std,
        }
        return model

    what = "The encoder, timm's VisionTransformer," if is_encoder else 'MaskedAutoencoderMFF'
    entry.__doc__ = f"""{what} of {name}, in eval mode.

    weights: None for random ones, or a file, a folder or hf-hub:ORG/NAME, of any known origin; then
    model.pretrained_cfg tells input_size, mean and std.
    """
    return entry


for _name in _models.MODELS:
    globals()[f'mff_{_name}'] = _entry(_name, is_encoder=False)
    globals()[f'mff_{_name}_encoder'] = _entry(_name, is_encoder=True)
