"""Loops that use autograd directly: second derivatives, gradients with respect to inputs."""

from rule import holds


def test_a_gradient_penalty(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for x, y in DATA:
            x = x.clone().requires_grad_()
            optimizer.zero_grad()
            out = model(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss = F.cross_entropy(out, y) + (slope.norm(dim=1) - 1).pow(2).mean()
            loss.backward()
            optimizer.step()
            print(loss.item())
        report(model)
        """,
        tmp_path,
        says="",
    )


def test_double_backward(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for x, y in DATA:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(create_graph=True)
            norm = sum(p.grad.pow(2).sum() for p in model.parameters())
            optimizer.zero_grad()
            norm.backward()
            optimizer.step()
            print(loss.item(), norm.item())
        report(model)
        """,
        tmp_path,
        says="the loop uses backward on a result",
        line="loss.backward(create_graph=True)",
    )


def test_adversarial_inputs(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            x = x.clone().requires_grad_()
            F.cross_entropy(model(x), y).backward()
            attacked = (x + 0.1 * x.grad.sign()).detach()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(attacked), y)
            loss.backward()
            optimizer.step()
            print(loss.item(), x.grad.sum().item())
        report(model)
        """,
        tmp_path,
    )


def test_gradients_without_backward(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            for p, g in zip(model.parameters(), gradients):
                p.grad = g
            optimizer.step()
        report(model)
        """,
        tmp_path,
        says="",
    )
