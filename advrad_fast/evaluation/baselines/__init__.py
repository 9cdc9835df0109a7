"""Detectors to hold AdvRAD against, on the same images, with the same score and under the same attacks.

- :mod:`autoencoder`: a convolutional autoencoder, trained plainly or adversarially (PGD on the reconstruction error).
- :mod:`purifier`: partial diffusion in front of another detector, as DiffPure (Nie et al., arXiv 2205.07460) in front of a
  classifier.

Each is a :class:`~advrad_fast.evaluation.baselines.base.Baseline`, which has what :mod:`advrad_fast.evaluation.attacks` needs
of a detector.

Not here: detectors on pretrained backbones (PatchCore, PaDiM), as no weights come with this package, and those of anomalib
(DRAEM, GANomaly), for which an adapter has not been tried.
"""
