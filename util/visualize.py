"""The picture of a pre-training: what the model makes of hidden patches."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio=0.75, noise=None):
    """What the model makes of imgs (N, C, H, W), normalised: (masked, reconstruction, pasted).

    With norm_pix_loss the model predicts each patch up to its mean and deviation. Both are taken
    from the target, hidden patches included, which leaks its coarse colours into the picture.
    pasted shows the visible patches as they were. MAE, figure 2.
    """
    model.eval()
    _, pred, mask = model(imgs, mask_ratio, noise)  # (N, L, p*p*C), (N, L)
    pred = pred.float()
    if model.norm_pix_loss:
        target = model.patchify(imgs)
        pred = pred * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    reconstruction = model.unpatchify(pred)
    hidden = model.unpatchify(mask.unsqueeze(-1).expand_as(pred)) > 0
    return imgs.masked_fill(hidden, 0), reconstruction, torch.where(hidden, reconstruction, imgs)


def reconstruction_figure(model, imgs, statistics, mask_ratio=0.75, noise=None):
    """Figure with a row for each of imgs (N, C, H, W): input, masked, reconstruction, pasted.

    statistics: (mean, std) by which imgs are normalised.
    """
    masked, reconstruction, pasted = reconstruct(model, imgs, mask_ratio, noise)
    columns = [imgs, masked, reconstruction, pasted]
    titles = ['input', 'masked', 'reconstruction', 'with visible patches']
    rows, _, height, width = imgs.shape
    column = 1.65 * rows * 1.06 * height / width  # inches; title and caption have the same at any
    figure = Figure(figsize=(7, column + 0.7), dpi=100)
    bottom, top = 0.35 / (column + 0.7), 1 - 0.3 / (column + 0.7)
    figure.subplots_adjust(0.015, bottom, 0.985, top, wspace=0.04)
    for axes, title, pictures in zip(figure.subplots(1, 4), titles, columns):
        axes.imshow(stack(to_pixels(pictures, *statistics)))
        axes.set_title(title, fontsize=10)
        axes.axis('off')
    caption = f'{mask_ratio:.0%} of the patches hidden, and only these are trained'
    if model.norm_pix_loss:
        caption += '; with the true mean and deviation of each patch'
    figure.text(0.5, 0.1 / (column + 0.7), caption, fontsize=8, ha='center')
    return figure


def to_pixels(imgs, mean, std):
    """imgs (N, C, H, W), normalised -> (N, 3, H, W) in 0..1; grey unless C is 3."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = (imgs.float().cpu() * std + mean).clamp(0, 1)
    return pixels if pixels.shape[1] == 3 else pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def stack(pixels):
    """(N, 3, H, W) -> an array (N * (H + gap), W, 3): one below the other, white between them."""
    gap = max(1, pixels.shape[2] // 16)
    return F.pad(pixels, (0, 0, 0, gap), value=1).permute(0, 2, 3, 1).flatten(0, 1).numpy()
