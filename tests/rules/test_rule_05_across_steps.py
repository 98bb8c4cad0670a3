"""Gradients may cross `optimizer.step()`: a step does not end a tape while a live value still needs a gradient."""

from rule import holds


def test_a_generator_trained_through_a_discriminator_that_has_stepped(tmp_path):
    holds(
        """
        generator, discriminator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)), mlp()
        of_g = torch.optim.Adam(generator.parameters(), lr=1e-2)
        of_d = torch.optim.Adam(discriminator.parameters(), lr=1e-2)
        real_label, fake_label = torch.ones(16, 4), torch.zeros(16, 4)
        for x, _ in DATA:
            fake = generator(x[:, :4])
            of_d.zero_grad()
            F.mse_loss(discriminator(x), real_label).backward()
            F.mse_loss(discriminator(fake.detach()), fake_label).backward()
            of_d.step()
            of_g.zero_grad()
            loss = F.mse_loss(discriminator(fake), real_label)
            loss.backward()
            of_g.step()
            print(loss.item())
        report(generator, discriminator)
        """,
        tmp_path,
        notes=1,  # the first iteration, in which one optimizer has stepped and the other has not
    )
