"""The mask that a map makes for itself: round the molecule, on any grid."""

import pytest
import torch

from cryodask.kernels.fourier import resize_map
from cryodask.kernels.masking import own_solvent_mask


def ball(box: int, pixel: float, radius: float, place: tuple[float, float, float]) -> torch.Tensor:
    c = (torch.arange(box).float() - box // 2) * pixel
    z, y, x = torch.meshgrid(c, c, c, indexing="ij")
    distance = ((z - place[0]) ** 2 + (y - place[1]) ** 2 + (x - place[2]) ** 2).sqrt()
    return torch.sigmoid((radius - distance) / 2.0)


@pytest.mark.parametrize(("box", "pixel"), [(64, 3.5), (112, 2.0), (114, 2.0), (160, 1.4)])
def test_the_mask_encloses_the_molecule_and_little_else_on_every_grid(box, pixel):
    place = (10.0, -14.0, 6.0)
    molecule = ball(box, pixel, 40.0, place)
    noisy = molecule + 0.1 * resize_map(torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0)), box)
    mask = own_solvent_mask(noisy, pixel, rings=20)
    assert mask.shape == molecule.shape
    inside, outside = ball(box, pixel, 38.0, place) > 0.5, ball(box, pixel, 72.0, place) < 0.5
    assert float(mask[inside].min()) > 0.95
    assert float(mask[outside].mean()) < 0.02
