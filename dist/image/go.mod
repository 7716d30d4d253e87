// The image is built by a module of its own so that `go test ./...` of the daemon's module neither downloads packages nor
// builds for other machines. It has no dependencies.
module github.com/overlayd/overlayd/dist/image

go 1.26.8
