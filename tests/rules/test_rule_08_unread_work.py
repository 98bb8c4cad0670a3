"""Unread work still happens, and unread results do not pile up."""

from rule import holds


def test_update_bn(tmp_path):
    holds(
        """
        from torch.optim.swa_utils import AveragedModel, update_bn

        model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        averaged = AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            averaged.update_parameters(model)
        update_bn(DATA, averaged)
        report(model, averaged)
        """,
        tmp_path,
    )


def test_batch_norm_statistics_collected_by_the_model_itself(tmp_path):
    holds(
        """
        model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for epoch in range(2):
            for x, y in DATA:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            with torch.no_grad():
                for x, _ in DATA:
                    model(x)
        report(model)
        """,
        tmp_path,
    )


def test_predictions_collected_without_no_grad(tmp_path):
    """Each keeps its gradient history alive, in torch as here, until the list is dropped."""
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        predictions = [model(x) for _ in range(30) for x, _ in DATA]
        print(torch.cat(predictions).sum().item())
        """,
        tmp_path,
        says="512 calls have been made and no backward()",
        line="predictions = [model(x)",
    )


def test_predictions_collected_under_no_grad(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            predictions = [model(x) for _ in range(30) for x, _ in DATA]
        print(torch.cat(predictions).sum().item())
        """,
        tmp_path,
    )
