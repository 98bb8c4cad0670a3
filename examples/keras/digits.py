"""Train a small convolutional network on scikit-learn's handwritten digits (1797 images of 8 x 8 pixels), in Keras.

    python digits.py                 # 20 epochs
    python digits.py --epochs 3      # a short run

Expected: test accuracy above 97% after 20 epochs (seeds 0 to 3: 98.9, 99.2, 98.6 and 98.3%, Keras 3.15.1).
"""

import argparse
import time

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits_cnn(dropout: float = 0.25) -> keras.Model:
    """Two convolution blocks and a classifier."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", use_bias=False),  # (B, 8, 8, 32)
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPooling2D(),  # (B, 4, 4, 32)
            layers.Conv2D(64, 3, padding="same", use_bias=False),  # (B, 4, 4, 64)
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),  # (B, 64)
            layers.Dropout(dropout),
            layers.Dense(10, activation="softmax"),
        ]
    )


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images float32[1437, 8, 8, 1] in [0, 1] and labels, then 360 test images and labels."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return x_train, y_train, x_test, y_test


def main() -> None:
    """Train, evaluate after every epoch, print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3, help="learning rate at the start; it falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    x_train, y_train, x_test, y_test = load_data()
    model = digits_cnn()
    steps = args.epochs * -(-len(x_train) // args.batch_size)
    model.compile(
        optimizer=keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(args.lr, steps), weight_decay=1e-2),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    started = time.perf_counter()
    model.fit(
        x_train, y_train, batch_size=args.batch_size, epochs=args.epochs, validation_data=(x_test, y_test), verbose=2
    )
    _, accuracy = model.evaluate(x_test, y_test, verbose=0)
    print(f"final: test_accuracy={accuracy:.4f} seconds={time.perf_counter() - started:.1f}")


if __name__ == "__main__":
    main()
