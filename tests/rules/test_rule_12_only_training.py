"""Only training is deferred: not the modules that prepare data, and nothing in forked workers."""

from rule import holds


def test_forked_loaders_run_plain_torch(tmp_path):
    ran = holds(
        """
        from torch.utils.data import DataLoader, Dataset

        class Transformed(Dataset):
            def __init__(self):
                self.transform = nn.Sequential(nn.LayerNorm(8), nn.Tanh())

            def __len__(self):
                return 128

            def __getitem__(self, index):
                x = torch.full((8,), index / 128) * torch.arange(8)
                return self.transform(x).detach(), index % 4

        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(Transformed(), batch_size=8, shuffle=True, num_workers=2)
        for epoch in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                print(loss.item(), y.sum().item())
        report(model)
        """,
        tmp_path,
    )
    assert not [line for line in ran.said if "fork" in line.lower()]


def test_a_metric_and_a_transform_are_torchs(tmp_path):
    holds(
        """
        class Metric(nn.Module):
            def __init__(self):
                super().__init__()
                self.total = 0

            def forward(self, out, y):
                self.total += (out.argmax(1) == y).sum().item()

        model, normalize, metric = mlp(), nn.BatchNorm1d(8, affine=False), Metric()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            x = normalize(x)
            optimizer.zero_grad()
            out = model(x)
            F.cross_entropy(out, y).backward()
            optimizer.step()
            metric(out.detach(), y)
        print(metric.total)
        report(model, normalize)
        """,
        tmp_path,
    )
