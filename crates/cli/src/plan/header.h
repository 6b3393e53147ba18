@head@
#ifndef POLICY_MSRGATE_H
#define POLICY_MSRGATE_H

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/kvm.h>

#define POLICY_HASH "@hash@"
#define POLICY_REASONS @reasons@

@filter@

/* What a reader of filters may leave out: nothing behind it changes what is const. */
#define MSRGATE_ANSWERS

/* Where a fixed answer is in the kernel's own register: policy_add_vcpu() puts it there. */
static const struct {
	__u32 msr;
	__u64 value;
} policy_presets[] = {
@presets@	{ 0, 0 }, /* none */
};

enum policy_action {
	POLICY_DENY,
	POLICY_PASS,    /* the filter has no room to allow it: what the kernel gives */
	POLICY_VALUE,   /* a */
	POLICY_IGNORE,
	POLICY_SHADOW,  /* a, until the guest writes */
	POLICY_MASK,    /* read: the kernel's & a | b. write: changes the bits of a; where b is 1 a change of another faults */
	POLICY_ONLY,    /* the b values from policy_values[a] on */
	POLICY_ONCE,
	POLICY_HOST,
	POLICY_HANDLER, /* policy_state.handlers[a] */
};

struct policy_entry {
	__u32 first;
	__u32 last;
	enum policy_action action;
	__u64 a;
	__u64 b;
};

/* What is answered of what the filter denies, in order; the last of each is none. */
static const struct policy_entry policy_reads[] = {
@reads@	{ 1, 0, POLICY_DENY, 0, 0 },
};
static const struct policy_entry policy_writes[] = {
@writes@	{ 1, 0, POLICY_DENY, 0, 0 },
};
/* What is answered of what the kernel does not know, and of what it refuses: a read and a write. */
static const struct policy_entry policy_unknown[2] = {
@unknown@};
static const struct policy_entry policy_invalid[2] = {
@invalid@};
static const __u64 policy_values[] = {
@values@	0,
};

/* The MSRs that keep a state for each vCPU, in order, and the number of the first one's cell; the last is none. */
static const struct {
	__u32 first;
	__u32 last;
	__u32 cell;
} policy_cells[] = {
@cells@	{ 1, 0, 0 },
};
#define POLICY_CELLS @cell_count@
/* MSRs beside these, whose shadows @spare_of@. */
#define POLICY_SPARE @spare@

/* What a vCPU remembers, without a pointer in it: save it with POLICY_HASH, and restore it where that is the same. */
struct policy_memory {
	struct {
		__u64 shadow;
		__u8 is_kept;
		__u8 is_written;
	} cells[POLICY_CELLS + 1];
	struct {
		__u64 shadow;
		__u32 msr;
	} spare[POLICY_SPARE + 1];
	__u32 spare_used;
};

/* The handlers that the policy names, by their places in policy_state.handlers. */
@handler_places@#define POLICY_HANDLERS @handler_count@

/* One vCPU: zeroed, then filled with the functions. Those that are not there fault the guest. */
struct policy_state {
	struct policy_memory memory;
	/* What the functions are given. */
	void *opaque;
	/* Answers for a handler: a read stores what the guest gets, a write finds what it writes. 0, or else #GP. */
	int (*handlers[POLICY_HANDLERS + 1])(void *opaque, __u32 msr, int write, __u64 *value);
	/* Reads the physical CPU's MSR, as by /dev/cpu/N/msr. 0, or else #GP. */
	int (*host)(void *opaque, __u32 msr, __u64 *value);
	int answering;
};

/* KVM_GET_MSRS and KVM_SET_MSRS of one MSR: `struct kvm_msrs` with its entry. The macros count the structure's size, which is
 * another in C++ with some headers. */
static inline int policy_get(int vcpu_fd, __u32 msr, __u64 *value)
{
	__u64 one[3] = { 1, 0, 0 };

	one[1] = msr;
	if (ioctl(vcpu_fd, 0xc008ae88ul, one) != 1)
		return -1;
	*value = one[2];
	return 0;
}

static inline int policy_set(int vcpu_fd, __u32 msr, __u64 value)
{
	__u64 one[3] = { 1, 0, 0 };

	one[1] = msr;
	one[2] = value;
	return ioctl(vcpu_fd, 0x4008ae89ul, one) == 1 ? 0 : -1;
}

/* Puts the policy in force on a VM, before its first vCPU runs: the reasons first, since else a denied access may fault before they
 * are set. 0, or a negative error number. */
static inline int policy_install(int vm_fd)
{
	struct kvm_enable_cap cap;
	int failed;

	memset(&cap, 0, sizeof(cap));
	cap.cap = KVM_CAP_X86_USER_SPACE_MSR;
	cap.args[0] = POLICY_REASONS;
	if (ioctl(vm_fd, KVM_ENABLE_CAP, &cap) < 0)
		return -errno;
	if (ioctl(vm_fd, KVM_X86_SET_MSR_FILTER, &policy_filter) == 0)
		return 0;
	failed = -errno;
	cap.args[0] = 0;
	ioctl(vm_fd, KVM_ENABLE_CAP, &cap);
	return failed;
}

/* Readies a vCPU, after KVM_SET_CPUID2 and before it runs. 0, or -EINVAL where the kernel does not hold a preset. */
static inline int policy_add_vcpu(int vcpu_fd)
{
	unsigned index;

	for (index = 1; index < sizeof(policy_presets) / sizeof(policy_presets[0]); index++) {
		__u64 value = 0;

		policy_set(vcpu_fd, policy_presets[index - 1].msr, policy_presets[index - 1].value);
		if (policy_get(vcpu_fd, policy_presets[index - 1].msr, &value) || value != policy_presets[index - 1].value)
			return -EINVAL;
	}
	return 0;
}

static inline const struct policy_entry *policy_find(const struct policy_entry *entries, unsigned count, __u32 msr)
{
	while (count > 0) {
		unsigned half = count / 2;

		if (entries[half].last < msr) {
			entries += half + 1;
			count -= half + 1;
		} else if (entries[half].first > msr) {
			count = half;
		} else {
			return &entries[half];
		}
	}
	return 0;
}

static inline int policy_cell(__u32 msr, __u32 *cell)
{
	unsigned index;

	for (index = 0; policy_cells[index].first <= policy_cells[index].last; index++) {
		if (policy_cells[index].first <= msr && msr <= policy_cells[index].last) {
			*cell = policy_cells[index].cell + (msr - policy_cells[index].first);
			return 1;
		}
	}
	return 0;
}

/* The place of an MSR's spare shadow, or where a new one has its place. */
static inline __u32 policy_spare(const struct policy_memory *memory, __u32 msr)
{
	__u32 place;

	for (place = 0; place < memory->spare_used && place + 1 <= POLICY_SPARE; place++) {
		if (memory->spare[place].msr == msr)
			break;
	}
	return place;
}

static inline __u64 policy_shadow(const struct policy_memory *memory, __u32 msr, __u64 initial)
{
	__u32 place;

	if (policy_cell(msr, &place))
		return memory->cells[place].is_kept ? memory->cells[place].shadow : initial;
	place = policy_spare(memory, msr);
	return place < memory->spare_used ? memory->spare[place].shadow : initial;
}

static inline int policy_keep(struct policy_memory *memory, __u32 msr, __u64 value)
{
	__u32 place;

	if (policy_cell(msr, &place)) {
		memory->cells[place].shadow = value;
		memory->cells[place].is_kept = 1;
		return 0;
	}
	place = policy_spare(memory, msr);
	if (place + 1 > POLICY_SPARE)
		return -1;
	memory->spare[place].msr = msr;
	memory->spare[place].shadow = value;
	if (place == memory->spare_used)
		memory->spare_used++;
	return 0;
}

static inline int policy_ask(struct policy_state *state, __u64 handler, __u32 msr, int write, __u64 *value)
{
	if (handler + 1 > POLICY_HANDLERS || !state->handlers[handler])
		return -1;
	return state->handlers[handler](state->opaque, msr, write, value) ? -1 : 0;
}

static inline int policy_read(const struct policy_entry *entry, struct policy_state *state, int vcpu_fd, __u32 msr, __u64 *value)
{
	if (!entry)
		return -1;
	switch (entry->action) {
	case POLICY_VALUE:
		*value = entry->a;
		return 0;
	case POLICY_SHADOW:
		*value = policy_shadow(&state->memory, msr, entry->a);
		return 0;
	case POLICY_MASK:
		if (policy_get(vcpu_fd, msr, value))
			return -1;
		*value = (*value & entry->a) | entry->b;
		return 0;
	case POLICY_HOST:
		return state->host && !state->host(state->opaque, msr, value) ? 0 : -1;
	case POLICY_HANDLER:
		return policy_ask(state, entry->a, msr, 0, value);
	default:
		return -1;
	}
}

static inline int policy_write(const struct policy_entry *entry, struct policy_state *state, int vcpu_fd, __u32 msr, __u64 value)
{
	__u64 old = 0, index;
	__u32 cell = 0;

	if (!entry)
		return -1;
	switch (entry->action) {
	case POLICY_IGNORE:
		return 0;
	case POLICY_SHADOW:
		return policy_keep(&state->memory, msr, value);
	case POLICY_MASK:
		if (policy_get(vcpu_fd, msr, &old) || (entry->b && ((old ^ value) & ~entry->a)))
			return -1;
		return policy_set(vcpu_fd, msr, (old & ~entry->a) | (value & entry->a));
	case POLICY_ONLY:
		for (index = 0; index < entry->b; index++) {
			if (policy_values[entry->a + index] == value)
				return policy_set(vcpu_fd, msr, value);
		}
		return -1;
	case POLICY_ONCE:
		if (!policy_cell(msr, &cell) || state->memory.cells[cell].is_written || policy_set(vcpu_fd, msr, value))
			return -1;
		state->memory.cells[cell].is_written = 1;
		return 0;
	case POLICY_HANDLER:
		return policy_ask(state, entry->a, msr, 1, &value);
	default:
		return -1;
	}
}

/* What an access gets: 0, or else #GP. `reason` is the kernel's, one bit. */
static inline int policy_access(struct policy_state *state, int vcpu_fd, __u32 msr, int write, __u32 reason, __u64 *value)
{
	const struct policy_entry *entry = 0;

	if (reason == KVM_MSR_EXIT_REASON_FILTER) {
		entry = write ? policy_find(policy_writes, sizeof(policy_writes) / sizeof(policy_writes[0]) - 1, msr) :
				policy_find(policy_reads, sizeof(policy_reads) / sizeof(policy_reads[0]) - 1, msr);
		if (entry && entry->action == POLICY_PASS) {
			if (!(write ? policy_set(vcpu_fd, msr, *value) : policy_get(vcpu_fd, msr, value)))
				return 0;
			/* The kernel refuses the guest too. */
			reason = KVM_MSR_EXIT_REASON_UNKNOWN;
		}
	}
	if (reason == KVM_MSR_EXIT_REASON_UNKNOWN)
		entry = &policy_unknown[write];
	else if (reason == KVM_MSR_EXIT_REASON_INVAL)
		entry = &policy_invalid[write];
	return write ? policy_write(entry, state, vcpu_fd, msr, *value) : policy_read(entry, state, vcpu_fd, msr, value);
}

/* Answers the exit in `run`, the vCPU's mapped kvm_run, after a KVM_RUN that gave 0; the next one carries the answer out. 1, or 0
 * where it is no exit of an MSR and nothing was touched. What cannot be answered faults the guest. */
static inline int policy_answer(struct kvm_run *run, struct policy_state *state, int vcpu_fd)
{
	__u64 value = 0;
	int write = run->exit_reason == KVM_EXIT_X86_WRMSR;

	if (!write && run->exit_reason != KVM_EXIT_X86_RDMSR)
		return 0;
	run->msr.error = 1;
	/* A handler that comes back here finds the exit not answered yet. */
	if (state->answering)
		return 1;
	state->answering = 1;
	if (write)
		value = run->msr.data;
	if (!policy_access(state, vcpu_fd, run->msr.index, write, run->msr.reason, &value)) {
		if (!write)
			run->msr.data = value;
		run->msr.error = 0;
	}
	state->answering = 0;
	/* After EINTR the kernel leaves the reason of the last exit: it is not to be answered twice. */
	run->exit_reason = KVM_EXIT_INTR;
	return 1;
}

#endif
