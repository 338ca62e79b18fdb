"""Train a robust network on the embedded digits, evaluate it, and read its run directory.

Run: python examples/01_train_and_evaluate.py
"""

import fastdynat

# The same run as: fastdynat train --method madry --steps 3 --epochs 2 --run-dir runs/example-01
run = fastdynat.train(
    data="digits", method="madry", steps=3, epochs=2, run_dir="runs/example-01", overwrite=True
)
print(run)
print(f"best epoch {run.best['epoch']}: validation PGD-10 accuracy {run.best['val_pgd10_acc']:.1%}")

# The test images of the run's data. 100 images show the order of magnitude, not decimals.
table = fastdynat.evaluate(run, attacks="clean,fgsm,pgd20", eps=0.1, num_images=100)
print(table)
print(f"PGD-20 leaves {table['pgd20']:.1%}, the worst case over the attacks {table.worst:.1%}")

# Later, or in another script: the weights of the best checkpoint.
network, about = fastdynat.load_network("runs/example-01")
print(f"{about.architecture} after {about.epoch} epochs, trained at eps {about.eps}")
