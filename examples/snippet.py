import torch

from flashdelta import chunk_gated_delta_rule

B, T, H, HV, K, V = 1, 128, 2, 4, 64, 64
q, k = (torch.randn(B, T, H, K, requires_grad=True) for _ in range(2))
v = torch.randn(B, T, HV, V, requires_grad=True)
g = torch.nn.functional.logsigmoid(torch.randn(B, T, HV))
beta = torch.rand(B, T, HV)
o, state = chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)
o.sum().backward()
print(o.shape, state.shape, q.grad.norm())
