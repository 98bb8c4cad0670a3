"""What forward leaves behind counts."""

from rule import holds


def test_an_auxiliary_loss_stored_on_a_module(tmp_path):
    ran = holds(
        """
        class Router(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()

            def forward(self, x):
                out = self.net(x)
                self.balance = out.softmax(-1).mean(0).pow(2).sum()
                return out

        model = Router()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + 0.1 * model.balance
            loss.backward()
            optimizer.step()
            print(loss.item())
        report(model)
        """,
        tmp_path,
    )
    assert ran.compiles == 1


def test_a_list_that_forward_fills(tmp_path):
    ran = holds(
        """
        SEEN = []

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()

            def forward(self, x):
                SEEN.append(x.shape[0])
                return self.net(x)

        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        print(len(SEEN))
        report(model)
        """,
        tmp_path,
    )
    assert ran.compiles == 1
