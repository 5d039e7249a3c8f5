"""DeepLabV3+ (Chen et al. 2018) in plain PyTorch: the twin of crates/models, tensors under the same names.

Written as torchvision and timm write these networks: rectifiers work in place wherever the graph allows it.
"""
import torch
from torch import nn
from torch.nn import functional as F

from fill import images, labels, parameter, rms

RATE, MOMENTUM, DECAY = 1e-4, 0.9, 1e-4


def conv(n_in, n_out, kernel, stride=1, dilation=1, groups=1):
    padding = dilation * (kernel // 2)
    return nn.Conv2d(n_in, n_out, kernel, stride, padding, dilation, groups, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, n_in, n_out, stride, dilation, projected):
        super().__init__()
        self.conv1, self.bn1 = conv(n_in, n_out, 3, stride, dilation), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = conv(n_out, n_out, 3, 1, dilation), nn.BatchNorm2d(n_out)
        skip = lambda: nn.Sequential(conv(n_in, n_out, 1, stride), nn.BatchNorm2d(n_out))
        self.downsample = skip() if projected else None

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    separable, channels, mean, std = False, (64, 512), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, n_blocks):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        n_in = 64
        # Output stride 16: the last stage is dilated instead of strided.
        for i, (stride, dilation) in enumerate([(1, 1), (2, 1), (2, 1), (1, 2)]):
            n_out, blocks = 64 << i, []
            for b in range(n_blocks[i]):
                blocks.append(BasicBlock(n_in, n_out, stride if b == 0 else 1, dilation, b == 0 and i > 0))
                n_in = n_out
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        low = self.layer1(x)
        return low, self.layer4(self.layer3(self.layer2(low)))


class ConvBn(nn.Module):
    def __init__(self, n_in, n_out, kernel, stride=1, dilation=1, eps=1e-5, relu=True):
        super().__init__()
        self.conv, self.bn = conv(n_in, n_out, kernel, stride, dilation), nn.BatchNorm2d(n_out, eps=eps)
        self.relu = relu

    def forward(self, x):
        x = self.bn(self.conv(x))
        return F.relu(x, inplace=True) if self.relu else x


class Separable(nn.Module):
    """Depthwise and pointwise, each normalised; a ReLU after both, or none."""

    def __init__(self, n_in, n_out, stride=1, dilation=1, eps=1e-5, relu=True):
        super().__init__()
        self.conv_dw, self.bn_dw = conv(n_in, n_in, 3, stride, dilation, n_in), nn.BatchNorm2d(n_in, eps=eps)
        self.conv_pw, self.bn_pw = conv(n_in, n_out, 1), nn.BatchNorm2d(n_out, eps=eps)
        self.relu = relu

    def forward(self, x):
        act = (lambda t: F.relu(t, inplace=True)) if self.relu else (lambda t: t)
        return act(self.bn_pw(self.conv_pw(act(self.bn_dw(self.conv_dw(x))))))


class XceptionBlock(nn.Module):
    def __init__(self, n_in, outs, stride, dilation, skip):
        super().__init__()
        self.skip = skip
        self.stack = nn.Module()
        for k, n_out in enumerate(outs):
            step = stride if k == 2 else 1
            part = Separable(n_in if k == 0 else outs[k - 1], n_out, step, dilation, eps=1e-3, relu=skip is None)
            setattr(self.stack, f"conv{k + 1}", part)
        if skip == "projection":
            self.shortcut = ConvBn(n_in, outs[2], 1, stride, eps=1e-3, relu=False)

    def forward(self, x, keep_second=False):
        """The block's output and that of its second convolution, before any ReLU."""
        if self.skip is None:
            second = self.stack.conv2(self.stack.conv1(x))
            return self.stack.conv3(second), second
        # Not in place where something else still needs the values: the skip, and the fine map.
        second = self.stack.conv2(F.relu(self.stack.conv1(F.relu(x)), inplace=True))
        out = self.stack.conv3(F.relu(second, inplace=not keep_second))
        out += self.shortcut(x) if self.skip == "projection" else x
        return out, second


class Xception(nn.Module):
    separable, channels, mean, std = True, (256, 2048), (0.5,) * 3, (0.5,) * 3

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(ConvBn(3, 32, 3, 2, eps=1e-3), ConvBn(32, 64, 3, eps=1e-3))
        entry = [((c,) * 3, 2, 1, "projection") for c in (128, 256, 728)]
        middle = [((728,) * 3, 1, 1, "identity")] * 16
        # Output stride 16: the exit's stride is dilation in the last block.
        exit = [((728, 1024, 1024), 1, 1, "projection"), ((1536, 1536, 2048), 1, 2, None)]
        blocks, n_in = [], 64
        for outs, stride, dilation, skip in entry + middle + exit:
            blocks.append(XceptionBlock(n_in, outs, stride, dilation, skip))
            n_in = outs[2]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x, second = block(x, keep_second=i == 1)
            if i == 1:
                low = second
        return low, x


class Decoder(nn.Module):
    def __init__(self, low, high, separable, classes):
        super().__init__()
        dense = lambda n_in, n_out, dilation=1: ConvBn(n_in, n_out, 3, dilation=dilation)
        three = (lambda n_in, n_out, dilation=1: Separable(n_in, n_out, dilation=dilation)) if separable else dense
        dilated = [three(high, 256, rate) for rate in (6, 12, 18)]
        self.aspp = nn.ModuleList([ConvBn(high, 256, 1), *dilated, ConvBn(high, 256, 1)])
        self.project, self.low = ConvBn(5 * 256, 256, 1), ConvBn(low, 48, 1)
        self.fuse = nn.ModuleList([three(256 + 48, 256), three(256, 256)])
        self.classifier = nn.Conv2d(256, classes, 1)

    def forward(self, low, high):
        pooled = self.aspp[4](F.adaptive_avg_pool2d(high, 1))
        pooled = F.interpolate(pooled, high.shape[2:], mode="bilinear", align_corners=True)
        x = self.project(torch.cat([*[self.aspp[i](high) for i in range(4)], pooled], 1))
        low = self.low(low)
        x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
        return self.classifier(self.fuse[1](self.fuse[0](torch.cat([x, low], 1))))


class DeepLab(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        n_blocks = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
        self.encoder = ResNet(n_blocks[encoder]) if encoder in n_blocks else Xception()
        self.decoder = Decoder(*self.encoder.channels, self.encoder.separable, classes)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.encoder, name)).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, x):
        return self.decoder(*self.encoder((x - self.mean) / self.std))


def network(encoder, classes):
    """A network with every tensor from the formula."""
    model = DeepLab(encoder, classes)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                value.copy_(parameter(key, tuple(value.shape)))
    return model


def optimizer(params):
    """SGD as our side has it: norms and biases are not decayed."""
    groups = [
        {"params": [p for p in params.values() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in params.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM)


class Train:
    """Forward, cross entropy at the labels' size, backward, SGD."""

    def __init__(self, work, layout):
        from operations import autocast, laid_out

        n, _, h, w = work["input"]
        self.autocast = lambda: autocast(layout)
        self.model = network(work["encoder"], work["classes"]).train()
        if layout != "nchw":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.images, self.labels = laid_out(images(work["input"]), layout), labels((n, h, w), work["classes"])
        self.params = dict(self.model.named_parameters())
        self.optimizer = optimizer(self.params)

    def gradients(self):
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.model(self.images)
        logits = F.interpolate(logits.float(), self.labels.shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, self.labels, ignore_index=255)
        loss.backward()
        return loss

    def answer(self):
        loss = float(self.gradients().detach())
        norm = float(torch.stack([p.grad.double().square().sum() for p in self.params.values()]).sum().sqrt())
        self.optimizer.step()
        return {"loss": loss, "grad-norm": norm}

    def run(self):
        self.gradients()
        self.optimizer.step()


class Inference:
    """One forward pass in evaluation, eager, without a graph."""

    def __init__(self, work, layout):
        from operations import autocast, laid_out

        self.autocast = lambda: autocast(layout)
        self.model = network(work["encoder"], work["classes"]).eval()
        if layout != "nchw":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.images = laid_out(images(work["input"]), layout)

    def logits(self):
        with torch.inference_mode(), self.autocast():
            return self.model(self.images)

    def answer(self):
        return {"logits": rms(self.logits())}

    def run(self):
        self.logits()


KINDS = {"train": Train, "inference": Inference}
