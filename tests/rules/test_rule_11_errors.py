"""Errors stay errors: see tests/pytorch/test_values.py for every operator that checks its values."""

from rule import holds


def test_an_index_out_of_range_is_torchs_own_error(tmp_path):
    holds(
        """
        model = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(32, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index, (_, y) in enumerate(DATA):
            words = torch.arange(64).reshape(16, 4) % 10
            if index % 8 == 7:
                words[0, 0] = 10
            optimizer.zero_grad()
            try:
                F.cross_entropy(model(words), y).backward()
                optimizer.step()
            except IndexError as error:
                print("refused:", error)
        report(model)
        """,
        tmp_path,
        says="an index is out of range",
        line="F.cross_entropy(model(words), y)",
    )
