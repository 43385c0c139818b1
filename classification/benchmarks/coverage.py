"""How often the report's 95% intervals hold the true AUROC, on simulated images that are alike within a patient.

    python benchmarks/coverage.py                   200 draws at the shape of the official test split, about a minute
    python benchmarks/coverage.py --patients 40     fewer patients

An image's score is N(1, .7) if it is positive, else N(0, .7), plus its patient's N(0, .7): the difference of two images
of different patients is normal, so the true AUROC between patients is known. Pairs within one patient are of another
AUROC but a vanishing part of all. Beside the bootstrap over patients: Obuchowski's clustered standard error, and
DeLong's, which takes images for independent.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from analysis import statistics

WITHIN = BETWEEN = 0.7


def simulate(rng, patients, images, evenness, prevalence=0.15):
    """(scores, targets, cluster) [N]: patients have different numbers of images, and are sicker or healthier."""
    sizes = 1 + rng.multinomial(images - patients, rng.dirichlet(np.full(patients, evenness)))
    cluster = np.repeat(np.arange(patients), sizes)
    risk = rng.beta(evenness, evenness * (1 - prevalence) / prevalence, patients)
    targets = (rng.random(images) < risk[cluster]).astype(float)
    scores = targets + rng.normal(0, BETWEEN, patients)[cluster] + rng.normal(0, WITHIN, images)
    return scores, targets, cluster


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=293)
    parser.add_argument("--images", type=int, default=5159)
    parser.add_argument("--evenness", type=float, default=2.0, help="of patients; below 1 a few have most positives")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=2000)
    args = parser.parse_args()
    truth = 0.5 * math.erfc(-1 / math.sqrt(2 * (BETWEEN**2 + WITHIN**2)) / math.sqrt(2))
    held = {"bootstrap over patients": [], "Obuchowski's clustered error": [], "DeLong, images independent": []}
    widths = {name: [] for name in held}
    values, started = [], time.time()
    for draw in range(args.draws):
        rng = np.random.default_rng(draw)
        scores, targets, cluster = simulate(rng, args.patients, args.images, args.evenness)
        weights = statistics.draw(args.patients, args.resamples, draw)
        auroc, _ = statistics.Ranking(scores, targets, cluster).areas(weights)
        clustered = statistics.placements(scores, targets, cluster)
        alone = statistics.placements(scores, targets, np.arange(len(scores)))
        values.append(clustered.auroc)
        intervals = [statistics.interval(auroc)]
        for placed in (clustered, alone):
            half = 1.96 * statistics.standard_error(placed)
            intervals.append((placed.auroc - half, placed.auroc + half))
        for name, (low, high) in zip(held, intervals):
            held[name].append(low <= truth <= high)
            widths[name].append(high - low)
    print(
        f"true AUROC {truth:.4f}; {args.draws} draws of {args.images:,} images of {args.patients} patients, "
        f"{args.resamples:,} resamples; {time.time() - started:.0f} s"
    )
    print(f"AUROC over the draws: mean {np.mean(values):.4f}, standard deviation {np.std(values, ddof=1):.4f}")
    print(f"{'95% interval by':32}{'covers':>8}{'mean width / 3.92':>20}")
    for name in held:
        print(f"{name:32}{np.mean(held[name]):8.1%}{np.mean(widths[name]) / 3.92:20.4f}")


if __name__ == "__main__":
    main()
