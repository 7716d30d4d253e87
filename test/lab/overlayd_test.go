package lab_test

import (
	"fmt"
	"testing"

	"github.com/overlayd/overlayd/test/lab"
	"github.com/overlayd/overlayd/test/labtest"
	"github.com/overlayd/overlayd/test/nstest"
)

// The real overlayd gives a flat pod network over every backend and stack: pod to pod on a node and across nodes, node
// to pod and back, all without NAT, and pod to the internet by masquerade.
func TestOverlayd(t *testing.T) {
	t.Parallel()
	nstest.NeedRoot(t)
	overlayd := labtest.BuildOverlayd(t)
	for _, o := range []lab.Options{
		{Backend: lab.VXLAN},
		{Backend: lab.VXLAN, Direct: true, Stack: lab.StackDual},
		{Backend: lab.VXLAN, Stack: lab.StackIPv6},
		{Backend: lab.HostGW, Stack: lab.StackDual},
	} {
		o.Overlayd = overlayd
		t.Run(fmt.Sprintf("%s direct=%v %s", o.Backend, o.Direct, o.Stack), func(t *testing.T) {
			labtest.Check(t, labtest.Up(t, o))
		})
	}
}
