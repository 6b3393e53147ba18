/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * libmsrgate: an MSR firewall for KVM guests.
 *
 * A policy says what a guest's RDMSR and WRMSR get. msrgate_load() compiles it, msrgate_install() puts it in force on a VM,
 * msrgate_vcpu_add() does for a vCPU, and msrgate_dispatch() answers the exits 29 and 30 (KVM_EXIT_X86_RDMSR, _WRMSR).
 *
 * Errors: a call that fails gives a negative error number, and a sentence in *err, which may be NULL. It has changed nothing,
 * but for what its description says. No call exits or unwinds, nor aborts, but where memory runs out.
 *
 * Memory: the caller owns the handles, and frees them by msrgate_free() in any order. Strings and buffers stay the caller's, and
 * are not kept after a call returns, but for the functions of handlers and what `opaque` points to.
 *
 * Threads: the library has no threads and no state of its own. A plan and a gate may be used by any thread at any time. A vCPU's
 * handle is used by one thread at a time, the one that runs the vCPU, or another while it is stopped. A handler is called on the
 * thread that dispatches, and no lock of the library's is held then. A handle must not be freed while a call uses it.
 *
 * msrgate(3) has an example. The system calls that a plan takes are in `msrgate plan --json`.
 */
#ifndef MSRGATE_H
#define MSRGATE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvm_cpuid2;
struct kvm_run;

/* A compiled policy. May be installed on any number of VMs. */
typedef struct msrgate_plan msrgate_plan;
/* A VM that holds a plan. */
typedef struct msrgate_gate msrgate_gate;
/* One vCPU: answers its exits, and keeps what `shadow` and `once` remember. */
typedef struct msrgate_vcpu msrgate_vcpu;

/* Why a call failed: a sentence, which ends with NUL and is cut where it is too long. Several findings stand on lines. */
struct msrgate_error {
	char message[1024];
};

/*
 * What answers a policy's `handler = "name"`.
 *
 * `access` is given the vCPU's opaque. For a read it stores to *value what the guest reads; for a write *value is what the guest
 * writes. It returns 0, or anything else for #GP(0) in the guest. It must not run the vCPU, nor unwind or jump out.
 */
struct msrgate_handler {
	const char *name;
	int (*access)(void *vcpu_opaque, uint32_t msr, int write, uint64_t *value);
};

/* Why an access got #GP(0) where the policy does not say `deny`: msrgate_answer.why. */
enum msrgate_why {
	MSRGATE_WHY_NONE = 0,
	MSRGATE_WHY_NO_RULE = 1,          /* no rule says what user space answers */
	MSRGATE_WHY_UNKNOWN_REASON = 2,   /* the kernel gave a reason that is not known here */
	MSRGATE_WHY_KERNEL_REFUSED = 3,   /* the kernel's register could not be read or written */
	MSRGATE_WHY_HOST_UNREADABLE = 4,  /* the physical CPU's register could not be read */
	MSRGATE_WHY_BITS_LOCKED = 5,      /* a write would change a bit outside `may_change` */
	MSRGATE_WHY_VALUE_NOT_LISTED = 6, /* the value is none of `only` */
	MSRGATE_WHY_ALREADY_WRITTEN = 7,  /* `once`, and it was written before */
	MSRGATE_WHY_NO_HANDLER = 8,       /* no handler of the name is there */
	MSRGATE_WHY_HANDLER_FAULT = 9,    /* the handler answered with a fault */
	MSRGATE_WHY_HANDLER_PANICKED = 10,
	MSRGATE_WHY_RE_ENTERED = 11,      /* dispatched from within a handler of the same vCPU */
	MSRGATE_WHY_SHADOW_FULL = 12,     /* no room for another shadow register */
	MSRGATE_WHY_VMM_FILTER = 13       /* another filter on the VM denies it; not given by this library */
};

/* An access and its answer. */
struct msrgate_answer {
	uint32_t msr;
	uint8_t write;   /* 0: RDMSR, 1: WRMSR */
	uint8_t faulted; /* 1: the guest gets #GP(0) */
	uint8_t why;     /* enum msrgate_why */
	uint8_t log;     /* 1: the policy's `log` says that this access is to be told */
	int32_t rule;    /* the rule that decided, from 0; -1: the default */
	uint64_t value;  /* what the guest wrote, or reads; 0 for a read that faulted */
};

/* How many accesses of a VM user space answered. The kernel's own answers are in none of them. */
struct msrgate_stats {
	uint64_t reads;
	uint64_t writes;
	uint64_t faults;   /* of both, those that got #GP(0) */
	uint64_t failures; /* of these, those where the policy does not say `deny` */
};

/* msrgate_restore(): forget first what the vCPU remembers, for a rollback in place. */
#define MSRGATE_ROLLBACK 1u

/*
 * Reads a policy and compiles it. `path` is a file's, or "msrgate:NAME" for a policy that comes with the library. `cpuid` is what
 * the guest gets by KVM_SET_CPUID2, for policies that depend on it; else NULL.
 *
 * 0, or -EINVAL (the policy is wrong, or needs a CPUID), -E2BIG (it needs more than 16 ranges).
 */
int msrgate_load(const char *path, const struct kvm_cpuid2 *cpuid, msrgate_plan **out, struct msrgate_error *err);

/*
 * Puts a plan in force on a VM: before its first vCPU runs. What the VM held before, KVM_CAP_X86_USER_SPACE_MSR and
 * KVM_X86_SET_MSR_FILTER, is replaced. The gate keeps duplicates of the descriptors, so KVM frees a VM only after it.
 * `handlers` are `n` of them, which are copied.
 *
 * 0, or -ENOENT (the policy names a handler that is not among them), -EOPNOTSUPP (the kernel has no MSR filters), the kernel's error.
 */
int msrgate_install(const msrgate_plan *plan, int kvm_fd, int vm_fd, const struct msrgate_handler *handlers, size_t n,
		    msrgate_gate **out, struct msrgate_error *err);

/* Puts another plan in force while vCPUs run: each access gets what the old plan says or what the new one says. */
int msrgate_replace(msrgate_gate *gate, const msrgate_plan *plan, struct msrgate_error *err);

/*
 * Adds a vCPU of the gate's VM: after KVM_SET_CPUID2, before it runs. `opaque` is what handlers are given.
 *
 * 0, or -EINVAL (the descriptor is not a vCPU's), the kernel's error.
 */
int msrgate_vcpu_add(msrgate_gate *gate, int vcpu_fd, uint32_t id, void *opaque, msrgate_vcpu **out,
		     struct msrgate_error *err);

/*
 * Answers the exit in `run`, if it is one of an MSR: to be called after a KVM_RUN that gave 0. The next KVM_RUN carries the answer
 * out. It cannot fail: what cannot be answered faults the guest. `answer` may be NULL.
 *
 * 1: answered. 0: it is another exit, and nothing was touched.
 */
int msrgate_dispatch(msrgate_vcpu *vcpu, struct kvm_run *run, struct msrgate_answer *answer);

/*
 * What the vCPU remembers (`shadow`, `once`), as text for a snapshot, without a NUL at its end. The vCPU is stopped. With `run`,
 * the access that was answered last is completed first, by a KVM_RUN with `immediate_exit`; with NULL the caller has done so.
 * Nothing is stored where `len` is too small.
 *
 * The bytes needed, or -EBUSY (an MSR exit is in `run`: dispatch it first), -EAGAIN (completing made another exit, which is in
 * `run`: handle it, and save again), -EDEADLK (from within a handler), the kernel's error.
 */
long msrgate_save(msrgate_vcpu *vcpu, struct kvm_run *run, char *buf, size_t len, struct msrgate_error *err);

/*
 * Puts what a saved vCPU remembered over what this one does: after msrgate_vcpu_add(), before it runs; under the same policy
 * alone. What is locked here stays locked, but for MSRGATE_ROLLBACK. The vCPU must not run after an error.
 *
 * 0, or -EINVAL (unknown flags), -EBADMSG (it is no state, or damaged), -ESTALE (it is another policy's), -EDEADLK (from within a handler).
 */
int msrgate_restore(msrgate_vcpu *vcpu, const char *buf, size_t len, unsigned flags, struct msrgate_error *err);

/* How many accesses were answered, as yet. */
void msrgate_stats(const msrgate_gate *gate, struct msrgate_stats *stats);

/* Frees these, each of which may be NULL. The VM's filter stays, and then denies without an answer. */
void msrgate_free(msrgate_plan *plan, msrgate_gate *gate, msrgate_vcpu *vcpu);

#ifdef __cplusplus
}
#endif
#endif
