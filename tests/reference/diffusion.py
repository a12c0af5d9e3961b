"""The diffusion process in float64 NumPy, from the formulas of the papers."""

import numpy as np
from scipy.integrate import solve_ivp


def cosine_logsnr(t):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""
    return 2 * (np.log(np.cos(np.pi * t / 2)) - np.log(np.sin(np.pi * t / 2)))


def discrete_linear_logsnr(steps=1000):
    """logsnr of DDPM's steps: alpha_bar is the cumulative product of 1 - beta."""
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, steps))
    return np.log(alpha_bar / (1.0 - alpha_bar))


def scales(logsnr):
    """(alpha, sigma) with alpha^2 / sigma^2 = SNR and alpha^2 + sigma^2 = 1."""
    snr = np.exp(np.float64(logsnr))
    return np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))


def predictions(x0, eps, logsnr):
    """z and the training target of each prediction type."""
    alpha, sigma = (s[:, None, None, None] for s in scales(logsnr))
    return alpha * x0 + sigma * eps, {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0}


def min_snr_weight(prediction, snr, gamma=5.0):
    """min-SNR weight on the error of the network's output."""
    return {
        "x0": np.minimum(snr, gamma),
        "eps": np.minimum(1.0, gamma / snr),
        "v": np.minimum(snr, gamma) / (snr + 1.0),
    }[prediction]


def dynamic_threshold(x0, percentile):
    """Clips each image to s, the percentile of |x0| or 1 if that is larger, and divides by s."""
    thresholded = []
    for image in x0:
        s = max(np.percentile(np.abs(image), percentile), 1.0)
        thresholded.append(np.clip(image, -s, s) / s)
    return np.stack(thresholded)


def gaussian_mean(z, logsnr, mean, deviation):
    """E[x0 | z] for data distributed as N(mean, deviation^2)."""
    alpha, sigma = scales(logsnr)
    variance = alpha**2 * deviation**2 + sigma**2
    return mean + alpha * deviation**2 / variance * (z - alpha * mean)


def mixture_mean(z, logsnr, shares, means, deviation):
    """E[x0 | z] for a mixture of N(means[k], deviation^2 I) with weights shares[k].

    z [n, d], means [k, d]; the posterior means of the components are averaged with their posterior
    probabilities.
    """
    alpha, sigma = scales(logsnr)
    variance = alpha**2 * deviation**2 + sigma**2
    offset = z[:, None] - alpha * means
    log_odds = np.log(shares) - 0.5 * np.sum(offset**2, axis=-1) / variance
    odds = np.exp(log_odds - log_odds.max(axis=1, keepdims=True))
    odds = (odds / odds.sum(axis=1, keepdims=True))[..., None]
    return np.sum(odds * (means + alpha * deviation**2 / variance * offset), axis=1)


def mixture_flow(z, logsnr_t, logsnr_s, *mixture):
    """Solution of the probability-flow ODE of the mixture by scipy's DOP853.

    With y = z / alpha and n = sigma / alpha the ODE is dy / d log n = y - x0.
    """
    shape = z.shape

    def slope(log_n, y):
        logsnr = -2.0 * log_n
        y = y.reshape(shape)
        x0 = mixture_mean(scales(logsnr)[0] * y, logsnr, *mixture)
        return (y - x0).ravel()

    alpha_t, alpha_s = scales(logsnr_t)[0], scales(logsnr_s)[0]
    solved = solve_ivp(
        slope,
        (-logsnr_t / 2, -logsnr_s / 2),
        (z / alpha_t).ravel(),
        "DOP853",
        rtol=1e-11,
        atol=1e-12,
    )
    return alpha_s * solved.y[:, -1].reshape(shape)
