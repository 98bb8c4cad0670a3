"""Inputs are values at the time of the call: what is written to them afterwards does not change what the call saw."""

from rule import holds


def test_a_label_is_refilled_between_two_calls(tmp_path):
    holds(
        """
        model, label = mlp(), torch.empty(16, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, _ in DATA:
            optimizer.zero_grad()
            label.fill_(1.0)
            real = F.mse_loss(model(x), label)
            real.backward()
            label.fill_(0.0)
            fake = F.mse_loss(model(-x), label)
            fake.backward()
            optimizer.step()
            print(real.item(), fake.item())
        report(model)
        """,
        tmp_path,
    )


def test_one_buffer_for_all_batches(tmp_path):
    holds(
        """
        model, batch = mlp(), torch.empty(16, 8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            batch.copy_(x)
            F.cross_entropy(model(batch), y).backward()
            batch.zero_()
            optimizer.step()
        report(model)
        """,
        tmp_path,
    )


def test_a_buffer_of_the_model_is_written_between_call_and_backward(tmp_path):
    holds(
        """
        class Shifted(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()
                self.register_buffer("shift", torch.zeros(4))

            def forward(self, x):
                return self.net(x) + self.shift

        model = Shifted()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index, (x, y) in enumerate(DATA):
            optimizer.zero_grad()
            out = model(x)
            model.shift.fill_(index / 10)
            F.cross_entropy(out, y).backward()
            optimizer.step()
        report(model)
        """,
        tmp_path,
        says="the model's state is read or changed between a call and its backward()",
        line="model.shift.fill_",
    )
