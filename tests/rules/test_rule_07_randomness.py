"""Random draws belong to the call, and a recomputed forward draws what the first one drew."""

from rule import holds, run


def test_a_checkpointed_block_recomputes_its_own_mask(tmp_path):
    """Output and gradient of a dropout show the mask: y = mask * w / (1 - p) and dy/dw = mask / (1 - p)."""
    ran = run(
        """
        from torch.utils.checkpoint import checkpoint

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(64))

            def block(self, x):
                return F.dropout(x * self.weight, 0.5)

            def forward(self, x):
                return checkpoint(self.block, x, use_reentrant=False)

        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(24):
            optimizer.zero_grad()
            out = model(torch.ones(64))
            out.sum().backward()
            assert torch.equal(out.detach(), model.weight.grad), (out, model.weight.grad)
            assert 10 < (out > 0).sum() < 54
            optimizer.step()
        print("equal")
        """,
        tmp_path,
        "--engine=xla",
    )
    assert ran.out == ["equal"] and ran.compiled_steps == 24


def test_a_checkpointed_model_trains_like_a_plain_one(tmp_path):
    holds(
        """
        from torch.utils.checkpoint import checkpoint

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 4)

            def forward(self, x):
                for block in self.blocks:
                    x = x + checkpoint(lambda x, block=block: block(x).tanh(), x, use_reentrant=False)
                return self.head(x)

        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for x, y in DATA:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            print(loss.item())
        report(model)
        """,
        tmp_path,
    )


def test_draws_inside_fork_rng_leave_the_generator_alone(tmp_path):
    holds(
        """
        model, drop = mlp(), nn.Dropout(0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for x, y in DATA:
            optimizer.zero_grad()
            with torch.random.fork_rng():
                out = drop(model(x))
            F.cross_entropy(out, y).backward()
            optimizer.step()
            print(torch.rand(()).item())
        """,
        tmp_path,
    )


def test_a_program_without_random_operators_draws_nothing(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            print(torch.randperm(16).tolist()[0], torch.rand(()).item())
        report(model)
        """,
        tmp_path,
    )


def test_a_forward_that_seeds_the_generator(tmp_path):
    ran = holds(
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()

            def forward(self, x):
                with torch.random.fork_rng():
                    torch.manual_seed(3)
                    return self.net(x) + torch.randn(4)

        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            print(torch.rand(()).item())
        report(model)
        """,
        tmp_path,
    )
    assert ran.compiles == 1
