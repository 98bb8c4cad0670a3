"""What the loop still holds when a tape ends is an output, and the set of outputs only grows."""

from rule import holds


def test_results_held_now_and_then(tmp_path):
    ran = holds(
        """
        model, held = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index, (x, y) in enumerate(DATA):
            optimizer.zero_grad()
            out = model(x)
            F.cross_entropy(out, y).backward()
            if index % 3 == 0:
                held.append(out)
            del out
            optimizer.step()
        print(*(out.sum().item() for out in held))
        report(model)
        """,
        tmp_path,
    )
    assert ran.compiles <= 2
