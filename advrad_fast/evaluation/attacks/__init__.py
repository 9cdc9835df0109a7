"""Attacks on a detector's score, by an attacker who knows everything but the draw of the noise.

An attacker raises the score of good parts and lowers that of bad ones: the *gain* is y A(x), y = +1 for label 0 and -1 for
label 1 (as in AdvRAD, arXiv 2408.04839), its expectation over the noise where the detector draws some.

- :mod:`pipeline`: the whole score, differentiable: one-shot reconstruction, error scales, filter, normal map, maximum.
- :mod:`camera`: the same from the camera's frame, through resizing or the alignment of the part.
- :mod:`projection`: onto a budget and the box [0, 1] at once, and from there to uint8 within the budget.
- :mod:`pgd`: projected gradient descent (Madry et al., arXiv 1706.06083) with expectation over the noise (Athalye et al.,
  arXiv 1802.00420), l_inf and l2.
- :mod:`square`: Square Attack (Andriushchenko et al., arXiv 1912.00049), which needs no gradient.
- :mod:`smoothed`: an attack on the smoothed detector, to try certificates.

A transferred attack is :func:`pgd` on another model's pipeline.

*Why own code.*  The libraries at hand (AutoAttack, torchattacks, Foolbox, ART) attack classifiers: logits and an
integer label, done once the arg max changes.  An anomaly score has no arg max, both its signs are wanted, and AUROC needs every
image pushed as far as the budget allows.  Their Square Attack keeps the best value of a noisy loss, which a randomised detector
beats by luck (AutoAttack leaves it out of its version for such models); their l2 projections scale into the ball and clip to the
box one after the other, which is not the projection onto both; and none delivers uint8 images within an l2 budget.
"""
