"""Names of kernels as traces of GPUs have them, shortened in their template arguments alone."""

import ast
from pathlib import Path

import pytest

from ijepa_scale.benchmark.categories import COMMUNICATION, OTHER, category_in, category_of
from ijepa_scale.plan.step_model import ATTENTION, COPIES, ELEMENTWISE, MATRIX, REDUCTIONS, TAIL
from tests.processes import ROOT

NATIVE = "void at::native::"
NAMES = {
    MATRIX: [
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT",
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align4>",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_64x1_tn_align8>",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "ampere_sgemm_128x64_nn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false>",
        "triton_tem_fused_addmm_gelu_3",
        "_linear_gelu_kernel",
        "aten::addmm",
        "aten::mm",
        "aten::bmm",
        "aten::addmm_",
    ],
    ATTENTION: [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<96, 128, 64, 4, false, false>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<32, 128, 128, 8, 4>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, Flash_bwd_kernel_traits<32, 128, 128, 8, 4, 4, 4>>",
        "void flash_bwd_convert_dq_kernel<Flash_bwd_kernel_traits<96, 64, 128, 8, 2, 4, 4, true, false>>(Params)",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Mainloop>>>",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_cga1x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    TAIL: [
        NATIVE + "(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>, FusedAdamMathFunctor>",
        NATIVE + "(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<1>, LpNormFunctor<float>>",
        "_ema_kernel",
        "_adamw_ema_kernel",
        "aten::_fused_adamw_",
    ],
    REDUCTIONS: [
        NATIVE + "(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, false>(int, float)",
        NATIVE + "(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<c10::BFloat16, float>",
        NATIVE + "(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<c10::BFloat16, float, 32u, 8u, 64u>",
        NATIVE + "(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>",
        NATIVE + "reduce_kernel<128, 4, at::native::ReduceOp<c10::BFloat16, func_wrapper_t<c10::BFloat16>>>",
        NATIVE + "(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float, c10::BFloat16>",
        "triton_red_fused_native_layer_norm_native_layer_norm_backward_sum_2",
        "triton_per_fused__to_copy_add_mm_native_layer_norm_0",
        "_target_loss_kernel",
        "_context_grad_kernel",
        "_column_sums_kernel",
        "aten::native_layer_norm",
        "aten::sum",
    ],
    ELEMENTWISE: [
        NATIVE + "vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>",
        NATIVE + "elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<CUDAFunctor_add<c10::BFloat16>>>",
        NATIVE + "indexSelectLargeIndex<c10::BFloat16, long, unsigned int, 2, 2, -2, true>",
        "triton_poi_fused__to_copy_addmm_gelu_view_1",
        "triton_poi_fused_add_native_layer_norm_4",
        "_gather_kernel",
        "_assemble_kernel",
        "_patchify_kernel",
        "aten::gelu",
        "aten::add_",
    ],
    COPIES: [
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        NATIVE + "(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<OpaqueType<2u>, unsigned int, 3, 128>",
        NATIVE + "vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>",
        NATIVE + "unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "aten::copy_",
    ],
    COMMUNICATION: ["ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    OTHER: ["void somebody::elses<int>"],
}


@pytest.mark.parametrize("category, name", [(category, name) for category, names in NAMES.items() for name in names])
def test_names(category, name):
    assert category_of(name) == category


def test_every_kernel_of_ours_has_a_category():
    kernels = [
        node.name
        for path in sorted(Path(ROOT / "kernels" / "ijepa_kernels").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and [ast.unparse(one) for one in node.decorator_list] == ["jit"]
        if node.name.endswith("_kernel")
    ]
    assert len(kernels) >= 8
    assert not [name for name in kernels if category_of(name) == OTHER]


def test_what_follows_the_backward_is_the_tail_whatever_it_does():
    copy = "Memcpy DtoD (Device -> Device)"
    assert [category_in(phase, copy) for phase in ("forward", "", "after the backward")] == [COPIES, COPIES, TAIL]
    assert category_in("after the backward", NAMES[COMMUNICATION][0]) == COMMUNICATION
