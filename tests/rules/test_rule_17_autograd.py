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
        says="the loop uses grad on a result",
        line="torch.autograd.grad(out.sum(), x, create_graph=True)",
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
        says="the loop uses grad on a result",
        line="torch.autograd.grad(F.cross_entropy(model(x), y)",
    )


def test_gradients_of_inputs_without_backward(tmp_path):
    holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            x = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
            optimizer.zero_grad()
            loss = F.cross_entropy(model((x + 0.1 * slope.sign()).detach()), y)
            loss.backward()
            optimizer.step()
            print(loss.item(), slope.sum().item())
        report(model)
        """,
        tmp_path,
        says="the loop uses grad on a result",
        line="(slope,) = torch.autograd.grad",
    )


def test_backward_of_torch_autograd(tmp_path):
    """The function is the method, and several results are one after the other."""
    ran = holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index, (x, y) in enumerate(DATA):
            optimizer.zero_grad()
            out = model(x)
            losses = [F.cross_entropy(out, y), out.pow(2).mean()]
            if index % 2:
                torch.autograd.backward(losses)
            else:
                torch.autograd.backward(losses[0], torch.tensor(0.5))
            optimizer.step()
            print(*(loss.item() for loss in losses))
        report(model)
        """,
        tmp_path,
    )
    assert ran.compiles == 2
