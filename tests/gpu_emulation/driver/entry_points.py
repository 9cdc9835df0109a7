"""The driver API that the fake answers: one table of signatures, from which the C source and the ctypes prototypes are made.

A letter stands for a parameter: ``p`` an address, a handle, a size or any other 64-bit word; ``u`` unsigned int; ``i`` int, an
enumeration or a device; ``h`` unsigned short; ``b`` unsigned char.  Handlers get plain integers for all of them.
"""

from __future__ import annotations

import ctypes
from typing import Any

_KINDS: dict[str, tuple[str, type]] = {
    "p": ("uint64_t", ctypes.c_uint64),
    "u": ("unsigned int", ctypes.c_uint32),
    "i": ("int", ctypes.c_int32),
    "h": ("unsigned short", ctypes.c_uint16),
    "b": ("unsigned char", ctypes.c_uint8),
}

#: What a component of the fake driver answers, by the symbol's name in the library.
SIGNATURES: dict[str, str] = {
    # library
    "cuInit": "u",
    "cuDriverGetVersion": "p",
    "cuGetErrorString": "ip",
    "cuGetErrorName": "ip",
    "cuGetProcAddress": "ppip",
    "cuGetProcAddress_v2": "ppipp",
    # devices
    "cuDeviceGet": "pi",
    "cuDeviceGetCount": "p",
    "cuDeviceGetName": "pii",
    "cuDeviceGetUuid_v2": "pi",
    "cuDeviceGetPCIBusId": "pii",
    "cuDeviceTotalMem_v2": "pi",
    "cuDeviceComputeCapability": "ppi",
    "cuDeviceGetAttribute": "pii",
    # contexts
    "cuDevicePrimaryCtxRetain": "pi",
    "cuDevicePrimaryCtxRelease_v2": "i",
    "cuDevicePrimaryCtxGetState": "ipp",
    "cuCtxCreate_v2": "pui",
    "cuCtxCreate_v4": "ppui",
    "cuCtxDestroy_v2": "p",
    "cuCtxDetach": "p",
    "cuCtxPushCurrent_v2": "p",
    "cuCtxPopCurrent_v2": "p",
    "cuCtxSetCurrent": "p",
    "cuCtxGetCurrent": "p",
    "cuCtxGetDevice": "p",
    "cuCtxSynchronize": "",
    "cuCtxGetApiVersion": "pp",
    # memory
    "cuMemAlloc_v2": "pp",
    "cuMemFree_v2": "p",
    "cuMemAllocAsync": "ppp",
    "cuMemFreeAsync": "pp",
    "cuMemGetInfo_v2": "pp",
    "cuMemGetAddressRange_v2": "ppp",
    "cuPointerGetAttributes": "uppp",
    "cuMemHostAlloc": "ppu",
    "cuMemFreeHost": "p",
    "cuMemHostGetDevicePointer_v2": "ppu",
    "cuMemHostGetFlags": "pp",
    "cuMemHostRegister_v2": "ppu",
    "cuMemHostUnregister": "p",
    # copies
    "cuMemcpyHtoD_v2": "ppp",
    "cuMemcpyDtoH_v2": "ppp",
    "cuMemcpyDtoD_v2": "ppp",
    "cuMemcpyHtoDAsync_v2": "pppp",
    "cuMemcpyDtoHAsync_v2": "pppp",
    "cuMemcpyDtoDAsync_v2": "pppp",
    "cuMemsetD8_v2": "pbp",
    "cuMemsetD16_v2": "php",
    "cuMemsetD32_v2": "pup",
    "cuMemsetD8Async": "pbpp",
    "cuMemsetD16Async": "phpp",
    "cuMemsetD32Async": "pupp",
    # streams and events
    "cuStreamCreate": "pu",
    "cuStreamCreateWithPriority": "pui",
    "cuStreamDestroy_v2": "p",
    "cuStreamSynchronize": "p",
    "cuStreamQuery": "p",
    "cuStreamWaitEvent": "ppu",
    "cuEventCreate": "pu",
    "cuEventDestroy_v2": "p",
    "cuEventRecord": "pp",
    "cuEventSynchronize": "p",
    "cuEventQuery": "p",
    "cuEventElapsedTime": "ppp",
    "cuEventElapsedTime_v2": "ppp",
    "cuLaunchHostFunc": "ppp",
    # modules and launches
    "cuModuleLoad": "pp",
    "cuModuleLoadData": "pp",
    "cuModuleLoadDataEx": "ppupp",
    "cuModuleUnload": "p",
    "cuModuleGetFunction": "ppp",
    "cuFuncGetAttribute": "pip",
    "cuFuncSetAttribute": "pii",
    "cuFuncSetBlockShape": "piii",
    "cuFuncSetSharedSize": "pu",
    "cuFuncSetCacheConfig": "pi",
    "cuLaunchKernel": "puuuuuuuppp",
    # graphs
    "cuStreamBeginCapture_v2": "pi",
    "cuStreamEndCapture": "pp",
    "cuStreamIsCapturing": "pp",
    "cuStreamGetCaptureInfo_v2": "pppppp",
    "cuThreadExchangeStreamCaptureMode": "p",
    "cuGraphGetNodes": "ppp",
    "cuGraphInstantiateWithFlags": "ppp",
    "cuGraphExecUpdate_v2": "ppp",
    "cuGraphKernelNodeGetParams": "pp",
    "cuGraphExecKernelNodeSetParams": "ppp",
    "cuGraphUpload": "pp",
    "cuGraphLaunch": "pp",
    "cuGraphExecDestroy": "p",
    "cuGraphDestroy": "p",
}

#: What pycuda links against beyond that.  A call gives CUDA_ERROR_NOT_SUPPORTED and is recorded.
NOT_SUPPORTED: tuple[str, ...] = (
    *("cuArray3DCreate_v2", "cuArray3DGetDescriptor_v2", "cuArrayCreate_v2", "cuArrayDestroy", "cuArrayGetDescriptor_v2"),
    *("cuCtxAttach", "cuCtxDisablePeerAccess", "cuCtxEnablePeerAccess", "cuCtxGetCacheConfig", "cuCtxGetLimit"),
    *("cuCtxGetSharedMemConfig", "cuCtxSetCacheConfig", "cuCtxSetLimit", "cuCtxSetSharedMemConfig"),
    *("cuDeviceCanAccessPeer", "cuDeviceGetByPCIBusId", "cuFuncSetSharedMemConfig"),
    *("cuIpcCloseMemHandle", "cuIpcGetEventHandle", "cuIpcGetMemHandle", "cuIpcOpenEventHandle", "cuIpcOpenMemHandle_v2"),
    *("cuLaunch", "cuLaunchGrid", "cuLaunchGridAsync"),
    *("cuLinkAddData_v2", "cuLinkAddFile_v2", "cuLinkComplete", "cuLinkCreate_v2", "cuLinkDestroy"),
    *("cuMemAllocManaged", "cuMemAllocPitch_v2", "cuMemcpy", "cuMemcpy2DAsync_v2", "cuMemcpy2DUnaligned_v2", "cuMemcpy2D_v2"),
    *("cuMemcpy3DAsync_v2", "cuMemcpy3DPeer", "cuMemcpy3DPeerAsync", "cuMemcpy3D_v2", "cuMemcpyAtoA_v2", "cuMemcpyAtoD_v2"),
    *("cuMemcpyAtoH_v2", "cuMemcpyDtoA_v2", "cuMemcpyHtoA_v2", "cuMemcpyPeer", "cuMemcpyPeerAsync"),
    *("cuMemsetD2D16Async", "cuMemsetD2D16_v2", "cuMemsetD2D32Async", "cuMemsetD2D32_v2", "cuMemsetD2D8Async", "cuMemsetD2D8_v2"),
    *("cuModuleGetGlobal_v2", "cuModuleGetSurfRef", "cuModuleGetTexRef"),
    *("cuParamSetSize", "cuParamSetTexRef", "cuParamSetf", "cuParamSeti", "cuParamSetv"),
    *("cuProfilerInitialize", "cuProfilerStart", "cuProfilerStop", "cuStreamAttachMemAsync"),
    *("cuSurfRefGetArray", "cuSurfRefSetArray", "cuTexRefCreate", "cuTexRefDestroy", "cuTexRefGetAddressMode"),
    *("cuTexRefGetAddress_v2", "cuTexRefGetArray", "cuTexRefGetFilterMode", "cuTexRefGetFlags", "cuTexRefGetFormat"),
    *("cuTexRefSetAddress2D_v3", "cuTexRefSetAddressMode", "cuTexRefSetAddress_v2", "cuTexRefSetArray"),
    *("cuTexRefSetFilterMode", "cuTexRefSetFlags", "cuTexRefSetFormat"),
)


def prototype(name: str) -> Any:
    """The ctypes function type of an entry point's handler."""
    return ctypes.CFUNCTYPE(ctypes.c_int, *(_KINDS[kind][1] for kind in SIGNATURES[name]))


#: The handler of everything else: it gets the name.
MISSING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


def c_source() -> str:
    """The library: every entry point jumps to its handler; with none registered it says that CUDA is deinitialised."""
    lines = [
        "#include <stdint.h>",
        "#include <string.h>",
        "typedef int CUresult;",
        "#define EXPORT __attribute__((visibility(\"default\")))",
        "#define DEINITIALIZED 4",
        "static CUresult (*missing)(const char *);",
    ]  # fmt: skip
    for name, kinds in SIGNATURES.items():
        types = [_KINDS[kind][0] for kind in kinds]
        parameters = ", ".join(f"{kind} a{i}" for i, kind in enumerate(types)) or "void"
        values = ", ".join(f"a{i}" for i in range(len(types)))
        # pycuda prints this one's answer without asking whether there is one.
        alone = '*(const char **)a1 = "no driver", DEINITIALIZED' if name == "cuGetErrorString" else "DEINITIALIZED"
        lines += [
            f"static CUresult (*handle_{name})({', '.join(types) or 'void'});",
            f"EXPORT CUresult {name}({parameters}) {{ return handle_{name} ? handle_{name}({values}) : ({alone}); }}",
        ]
    for name in NOT_SUPPORTED:
        lines.append(f'EXPORT CUresult {name}(void) {{ return missing ? missing("{name}") : DEINITIALIZED; }}')
    lines += [
        "static CUresult nothing(void) { return 0; }  /* callers pass arguments: the C ABIs that CUDA runs on ignore them */",
        "EXPORT void *advrad_fake_nothing(void) { return (void *)nothing; }",
        "EXPORT void advrad_fake_missing(void *function) { missing = (CUresult (*)(const char *))function; }",
        "EXPORT int advrad_fake_register(const char *name, void *function) {",
    ]
    for name in SIGNATURES:
        lines.append(f'    if (!strcmp(name, "{name}")) {{ *(void **)&handle_{name} = function; return 1; }}')
    lines += ["    return 0;", "}", ""]
    return "\n".join(lines)
