"""Denoise and segment pictures, which are sent to workers and back (scikit-image)."""

import numpy as np
from _pool import executor
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label, regionprops
from skimage.restoration import denoise_tv_chambolle


def segment(picture):
    smooth = denoise_tv_chambolle(gaussian(picture, 1.0), weight=0.1, max_num_iter=30)
    labels = label(smooth > threshold_otsu(smooth))
    return smooth, len(regionprops(labels))


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    pictures = [rng.random((384, 384)) + np.outer(*[np.hanning(384)] * 2) for _ in range(40)]
    with executor() as pool:
        print(sum(count for _, count in pool.map(segment, pictures)) > 0)
