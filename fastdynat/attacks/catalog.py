"""The names that an evaluation's attacks have, with one line each; how they are read is in
`fastdynat.attacks.names`.
"""

# What a misspelt name is compared with.
ATTACKS = {
    "clean": "no attack",
    "fgsm": "one step of size eps from the image (Goodfellow et al. 2015; torchattacks, foolbox, most tables)",
    "fgsm-rs": "one step of size eps from a uniform start (the FGSM of DYNAT's and Rice et al.'s evaluation)",
    "fgsm-small": "one step of --step-size from the image, hardly an attack (the FGSM of TRADES' and LBGAT's tables: 0.003)",
    "bim": "bimK, K = 10 unless given: PGD from the image itself, without a random start (Kurakin et al. 2017)",
    "mim": "mimK, K = 10 unless given: the same with momentum 1 over g / mean|g| (Dong et al. 2018); linf and l2",
    "pgd20": "pgdK: K steps on the cross-entropy from a uniform start (Madry et al. 2018); l1 is SLIDE; l0 counts pixels",
    "pgd50-10": "pgdK-R: with R restarts, each on what still stands; the last iterate of each counts",
    "cw": "cwK, K = 20 unless given: PGD on the margin of the logits, the C&W-inf of the literature; cwK-R",
    "cw20-k50": "cwK-kC: the same until the margin is C (GAIRAT, MAIL: 50)",
    "pgd20@second": "any of these @second, @least (likely other class), @random, @next, @all: towards a class, not away",
    "cwl2": "the nearest in L2 by Carlini & Wagner 2017: 9 runs of 1000 steps; cwl2-BxK; cwl2-1xK has a fixed c = 1",
    "deepfool": "the nearest in L2 by DeepFool (Moosavi-Dezfooli et al. 2016), 50 steps; deepfoolK",
    "deepfool-linf": "the same in L-inf",
    "sigmazero": "the fewest changed pixels by sigma-zero (Cina et al. 2024), 1000 steps; sigmazeroK",
    "apgd-ce": "APGD on the cross-entropy (Croce & Hein 2020), 100 steps; apgd-ceK, apgd-ceK-R",
    "apgd-dlr": "APGD on the difference of logits ratio",
    "apgd-t": "APGD on the targeted difference of logits ratio, towards nine classes",
    "fab": "FAB (Croce & Hein 2020) towards the nearest boundary, ended at eps; fab-R",
    "fab-t": "FAB towards nine classes; fab-t-R",
    "fab-min": "the nearest by FAB at any distance; fab-t-min",
    "square": "Square Attack (Andriushchenko et al. 2020), 5000 queries, no gradients; squareQ",
}
AUTOATTACK, FAST_AUTOATTACK, TRANSFER = "autoattack", "fast-autoattack", "transfer-"
# Every name that --attacks takes: what `fastdynat eval --list-attacks` prints.
KNOWN = {
    **ATTACKS,
    AUTOATTACK: "AutoAttack (Croce & Hein 2020), standard version, by its reference package (extra `autoattack`), in float32",
    FAST_AUTOATTACK: "the same four attacks in the same order (apgd-ce, apgd-t, fab-t, square) on the fast engine",
    f"{TRANSFER}NAME": "NAME made on the network of --source and counted on this one",
}
