"""Adversarial training: gradients of the generator cross the discriminator's step."""

import pytest
import torch
from parity import assert_same_training
from small import batches
from torch import nn
from torch.nn import functional as F


def gan():
    generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(True), nn.Linear(16, 8), nn.Tanh())
    discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2, inplace=True), nn.Linear(16, 1), nn.Sigmoid())
    return {
        "netG": generator,
        "netD": discriminator,
        "optimizerD": torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
        "optimizerG": torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999)),
    }


@pytest.mark.parametrize("reads", [True, False])
def test_dcgan(reads):
    """The loop that everybody copies: gradients of the generator cross the discriminator's step."""

    def loop(objects, data):
        netG, netD = objects["netG"], objects["netD"]
        optimizerD, optimizerG = objects["optimizerD"], objects["optimizerG"]
        criterion = nn.BCELoss()
        real_label, fake_label = 1.0, 0.0
        seen = []
        for i, batch in enumerate(data, 0):
            netD.zero_grad()
            real_cpu = batch[0]
            b_size = real_cpu.size(0)
            label = torch.full((b_size,), real_label)
            output = netD(real_cpu).view(-1)
            errD_real = criterion(output, label)
            errD_real.backward()
            D_x = output.mean().item() if reads else 0.0

            noise = torch.randn(b_size, 4)
            fake = netG(noise)
            label.fill_(fake_label)
            output = netD(fake.detach()).view(-1)
            errD_fake = criterion(output, label)
            errD_fake.backward()
            D_G_z1 = output.mean().item() if reads else 0.0
            errD = errD_real + errD_fake
            optimizerD.step()

            netG.zero_grad()
            label.fill_(real_label)
            output = netD(fake).view(-1)
            errG = criterion(output, label)
            errG.backward()
            D_G_z2 = output.mean().item() if reads else 0.0
            optimizerG.step()
            if reads or i % 5 == 0:
                seen += [errD.item(), errG.item(), D_x, D_G_z1, D_G_z2]
        return seen

    # Without reads: the real batch's gradients, which the fake batch's are added to, and all the rest.
    assert_same_training(gan, loop, batches(), max_compiles=6 if reads else 2)


def test_gan_with_one_loss_for_the_discriminator_is_one_program():
    def loop(objects, data):
        seen = []
        for x, _ in data:
            fake = objects["netG"](torch.randn(len(x), 4))
            objects["optimizerD"].zero_grad()
            scores = objects["netD"](torch.cat([x, fake.detach()]))
            truth = torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)])
            loss_d = F.binary_cross_entropy(scores, truth)
            loss_d.backward()
            objects["optimizerD"].step()

            objects["optimizerG"].zero_grad()
            loss_g = -objects["netD"](fake).log().mean()
            loss_g.backward()
            objects["optimizerG"].step()
            seen += [loss_d.item(), loss_g.item()]
        return seen

    assert_same_training(gan, loop, batches(), max_compiles=1)


@pytest.mark.parametrize("scales", [True, False])
def test_what_reads_gradients_is_looked_at_while_another_gradient_crosses_the_step(scales):
    """A clipped norm, and what a GradScaler finds, are computed from gradients, which are no arguments of theirs."""

    def loop(objects, data):
        netG, netD = objects["netG"], objects["netD"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scales)
        seen = []

        def step(loss, net, optimizer):
            net.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            seen.extend([value.item() if value.isfinite() else -1.0 for value in (loss, norm)] + [scaler.get_scale()])

        for i, (batch, _) in enumerate(data):
            noise = torch.randn(batch.size(0), 4)
            fake = netG(noise)
            factor = float("inf") if scales and i == 9 else 1.0
            step((netD(fake.detach()).mean() - netD(batch).mean()) * factor, netD, objects["optimizerD"])
            step(-netD(fake).mean(), netG, objects["optimizerG"])
        return seen

    assert_same_training(gan, loop, batches(20), dtypes=(torch.float64,), may_fall_back=True)
