// What accesses.c does, by a VMM in Go: its system calls are the runtime's own instructions, its stacks are small, and the
// runtime's signals interrupt KVM_RUN. With `WAIT` set in the environment each guest runs and makes no access until there is a line on
// standard input.
package main

import (
	"bufio"
	_ "embed"
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// The guest of guest.h, and at its end where the handler of faults is.
//
//go:embed guest.bin
var guest []byte

const (
	createVM        = 0xae01
	vcpuMmapSize    = 0xae04
	createVCPU      = 0xae41
	setMemoryRegion = 0x4020ae46
	run             = 0xae80
	setRegs         = 0x4090ae82
	getSregs        = 0x8138ae83
	setSregs        = 0x4138ae84

	memoryBytes = 1 << 20
	code        = 0x1000
	areas       = 0x10000
	exitHalt    = 5
	// An operation of guest.h.
	wait = 6
)

func fail(what string, errno syscall.Errno) {
	fmt.Fprintf(os.Stderr, "%s: %v\n", what, errno)
	os.Exit(9)
}

func ioctl(what string, fd, request, argument uintptr) uintptr {
	for {
		result, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, request, argument)
		if errno == 0 {
			return result
		}
		if errno != syscall.EINTR {
			fail(what, errno)
		}
	}
}

func pointer(to []byte) uintptr { return uintptr(unsafe.Pointer(&to[0])) }

func mmap(fd, bytes int, flags int) []byte {
	memory, err := syscall.Mmap(fd, 0, bytes, syscall.PROT_READ|syscall.PROT_WRITE, flags)
	if err != nil {
		fail("mmap", err.(syscall.Errno))
	}
	return memory
}

// A request as guest.h has it: MSR, operation, value, fault, counts.
func ask(request []byte, text string) {
	letter, rest, _ := strings.Cut(text, ":")
	index, value, _ := strings.Cut(rest, "=")
	msr, _ := strconv.ParseUint(index, 0, 32)
	number, _ := strconv.ParseUint(value, 0, 64)
	binary.LittleEndian.PutUint32(request, uint32(msr))
	operation := uint32(strings.Index(" rwa", letter))
	binary.LittleEndian.PutUint32(request[4:], operation)
	if operation == 3 {
		binary.LittleEndian.PutUint32(request[20:], uint32(number))
	} else {
		binary.LittleEndian.PutUint64(request[8:], number)
	}
}

func show(request []byte) {
	msr := binary.LittleEndian.Uint32(request)
	name := "rdmsr"
	if binary.LittleEndian.Uint32(request[4:]) == 2 {
		name = "wrmsr"
	}
	switch {
	case binary.LittleEndian.Uint32(request[16:]) != 0:
		fmt.Printf("%s %#x fault\n", name, msr)
	case name == "wrmsr":
		fmt.Printf("wrmsr %#x done\n", msr)
	default:
		fmt.Printf("rdmsr %#x %#x\n", msr, binary.LittleEndian.Uint64(request[8:]))
	}
}

func main() {
	words := os.Args[1:]
	vcpus := 1
	if len(words) > 0 && !strings.Contains(words[0], ":") {
		vcpus, _ = strconv.Atoi(words[0])
		words = words[1:]
	}
	// To a VMM that may not open it, it is handed over.
	kvm, err := strconv.Atoi(os.Getenv("KVM_FD"))
	if err != nil {
		kvm, err = syscall.Open("/dev/kvm", syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		if err != nil {
			fail("/dev/kvm", err.(syscall.Errno))
		}
	}
	vm := ioctl("KVM_CREATE_VM", uintptr(kvm), createVM, 0)
	size := int(ioctl("KVM_GET_VCPU_MMAP_SIZE", uintptr(kvm), vcpuMmapSize, 0))
	memory := mmap(-1, memoryBytes, syscall.MAP_SHARED|syscall.MAP_ANON)
	region := make([]byte, 32)
	binary.LittleEndian.PutUint64(region[16:], memoryBytes)
	binary.LittleEndian.PutUint64(region[24:], uint64(pointer(memory)))
	ioctl("KVM_SET_USER_MEMORY_REGION", vm, setMemoryRegion, pointer(region))
	end := len(guest) - 2
	copy(memory[code:], guest[:end])
	fault := binary.LittleEndian.Uint16(guest[end:])
	binary.LittleEndian.PutUint16(memory[13*4:], code+fault)

	area := 0x10000 / vcpus &^ 0xf
	for id := 0; id < vcpus; id++ {
		made, done := make(chan struct{}), make(chan struct{})
		requests := memory[areas+id*area+64:]
		for i, word := range words {
			ask(requests[i*32:], word)
		}
		first := binary.LittleEndian.Uint32(requests[4:])
		waits := os.Getenv("WAIT") != ""
		if waits {
			binary.LittleEndian.PutUint32(requests[4:], wait)
		}
		go func() {
			runtime.LockOSThread()
			one(vm, uintptr(id), uint64(areas+id*area), size, made)
			close(done)
		}()
		if waits {
			<-made
			fmt.Printf("ready %d\n", vm)
			bufio.NewReader(os.Stdin).ReadString('\n')
			atomic.StoreUint32((*uint32)(unsafe.Pointer(&requests[4])), first)
		}
		<-done
		for i := range words {
			show(requests[i*32:])
		}
	}
}

// One vCPU, until its guest halts.
func one(vm, id uintptr, area uint64, size int, made chan struct{}) {
	vcpu := ioctl("KVM_CREATE_VCPU", vm, createVCPU, id)
	close(made)
	page := mmap(int(vcpu), size, syscall.MAP_SHARED)
	special := make([]byte, 0x138)
	ioctl("KVM_GET_SREGS", vcpu, getSregs, pointer(special))
	// CS, DS and SS: 24 bytes each, the base first, then a limit and the selector.
	for number, base := range map[int]uint64{0: 0, 1: area, 5: area} {
		binary.LittleEndian.PutUint64(special[number*24:], base)
		binary.LittleEndian.PutUint16(special[number*24+12:], uint16(base/16))
	}
	ioctl("KVM_SET_SREGS", vcpu, setSregs, pointer(special))
	registers := make([]byte, 0x90)
	// RSI, RSP, RIP, RFLAGS.
	for place, value := range map[int]uint64{4: 64, 6: 64, 16: code, 17: 2} {
		binary.LittleEndian.PutUint64(registers[place*8:], value)
	}
	ioctl("KVM_SET_REGS", vcpu, setRegs, pointer(registers))
	ioctl("KVM_RUN", vcpu, run, 0)
	if reason := binary.LittleEndian.Uint32(page[8:]); reason != exitHalt {
		fmt.Fprintf(os.Stderr, "exit %d\n", reason)
		os.Exit(8)
	}
}
